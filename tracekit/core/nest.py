"""What modules take and return: a tensor, or tuples, lists, dictionaries, dataclasses of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# A tensor, or any container of tensors and other values that a module may take or return.
Nest: TypeAlias = Any  # a model's own values have no better common type


def tensors(nest: Nest) -> Iterator[Tensor]:
    """Every tensor in `nest`, in order."""
    if isinstance(nest, Tensor):
        yield nest
        return
    for child in _children(nest):
        if isinstance(child, Tensor):
            yield child
        elif child is not None:
            yield from tensors(child)


def named_tensors(
    nest: Nest, key: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in `nest`, in the order of `tensors`, after the way to it, by key."""
    if isinstance(nest, Tensor):
        yield key, nest
        return
    for name, child in _named_children(nest).items():
        yield from named_tensors(child, (*key, name))


def difference(new: Nest, old: Nest, key: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
    """The way to the first value that is another in `new`, whatever the tensors hold."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return None
    news, olds = _named_children(new), _named_children(old)
    if isinstance(new, Tensor) or isinstance(old, Tensor) or news.keys() != olds.keys():
        return key
    if not olds:
        return None if _is_same(new, old) else key
    found = (difference(news[name], olds[name], (*key, name)) for name in olds)
    return next((each for each in found if each is not None), None)


def map_leaves(change: Callable[[Any], Any], nest: Nest) -> Nest:
    """`nest` with every leaf replaced by `change(leaf)`; containers are rebuilt, never changed."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, (list, tuple, set, frozenset)):
        return _rebuilt_sequence(nest, [map_leaves(change, item) for item in _items(nest)])
    if isinstance(nest, MutableMapping):
        items = cast("MutableMapping[Any, Any]", nest)
        return _with_values(items, {key: map_leaves(change, items[key]) for key in items})
    if _is_dataclass(nest):
        fields = {name: map_leaves(change, getattr(nest, name)) for name in _field_names(nest)}
        return _with_fields(nest, fields)
    if isinstance(nest, Mapping):  # one that can't be filled: a plain dict then
        items = cast("Mapping[Any, Any]", nest)
        return {key: map_leaves(change, items[key]) for key in items}
    return change(nest)


def first_tensor(nest: Nest) -> Tensor | None:
    """The hidden state by convention: the tensor itself, or the first tensor of the structure."""
    return next(tensors(nest), None)


def first_input(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Of `(args, kwargs)`: the first positional argument, else the first keyword's, else None."""
    args, kwargs = inputs
    return args[0] if args else next(iter(kwargs.values()), None)


def replace_first_tensor(nest: Nest, value: object) -> Nest:
    """`nest` with its first tensor replaced, in the same structure."""
    return replace_tensor(nest, first_tensor(nest), value)


def replace_tensor(nest: Nest, old: object, new: object) -> Nest:
    """`nest` with `new` wherever `old` is, in the same structure."""
    return map_leaves(lambda leaf: new if leaf is old else leaf, nest)


def on_one_device(values: Iterable[Tensor]) -> list[Tensor]:
    """The tensors where the first of them is: a model's layers may lie on several devices."""
    every = list(values)
    return [value.to(every[0].device) for value in every]


def is_fake(value: object) -> bool:
    """Whether `value` is a tensor without numbers, of a dry run."""
    return isinstance(value, FakeTensor)


def describe(value: object) -> str:
    """One line for people: `Tensor[1, 10, 768] float32 cpu`, `tuple of 2`, `DynamicCache`."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"Tensor{list(value.shape)} {dtype} {value.device}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(_items(value))}"
    if isinstance(value, Mapping):
        names = ", ".join(str(key) for key in cast("Mapping[Any, Any]", value))
        return f"{type(value).__name__}({names})"
    return type(value).__name__ if value is not None else "None"


def misfit(new: Nest, old: Nest, where: str = "the value") -> str | None:
    """Why `new` cannot stand in the place of `old`, in words; None if it can."""
    if isinstance(old, Tensor):
        return _tensor_misfit(new, old, where)
    if old is None:
        return None  # an optional value, left out: a mask may be given, for one
    if isinstance(new, Tensor):
        return f"{where} was {describe(old)}, not a tensor"
    olds, news = _named_children(old), _named_children(new)
    if (olds or news) and (type(new) is not type(old) or len(olds) != len(news)):
        return f"{where} was {describe(old)}, and {describe(new)} was written"
    for name in olds:
        if name not in news:
            return f"{where} had {name!r}, and what was written has not"
        found = misfit(news[name], olds[name], f"{_item(name)} of {where}")
        if found is not None:
            return found
    return None


def _item(name: object) -> str:
    return f"item {name}" if isinstance(name, int) else repr(name)


def _tensor_misfit(new: object, old: Tensor, where: str) -> str | None:
    if not isinstance(new, Tensor):
        return f"{where} was {describe(old)}, and {describe(new)} was written"
    if is_fake(new) and not is_fake(old):
        return f"{where} was {describe(old)}, and one without numbers, of a dry run, was written"
    if new.shape == old.shape and new.dtype == old.dtype and new.device == old.device:
        return None
    found = f"{where} was {describe(old)}, and {describe(new)} was written"
    is_elsewhere = new.shape == old.shape and new.dtype == old.dtype
    return f"{found} (its .to({str(old.device)!r}) fits)" if is_elsewhere else found


def _is_same(new: object, old: object) -> bool:
    if new is old:
        return True
    try:
        return type(new) is type(old) and bool(new == old)
    except Exception:  # noqa: BLE001 - arrays, for one, have no one answer
        return False


def _children(nest: Nest) -> Iterable[Nest]:
    if isinstance(nest, (list, tuple, set, frozenset)):
        return _items(nest)
    return _named_children(nest).values()


def _named_children(nest: Nest) -> dict[Any, Nest]:
    if isinstance(nest, (list, tuple, set, frozenset)):
        return dict(enumerate(_items(nest)))
    if isinstance(nest, Mapping):
        return dict(cast("Mapping[Any, Any]", nest))
    if _is_dataclass(nest):
        return {name: getattr(nest, name) for name in _field_names(nest)}
    return {}


def _items(nest: Any) -> list[Any]:
    return list(nest)


def _rebuilt_sequence(nest: Any, items: list[Any]) -> Any:
    kind = cast("type[Any]", type(nest))
    if hasattr(kind, "_fields"):  # a named tuple takes its fields one by one
        return kind(*items)
    if kind is torch.Size:
        return nest
    try:
        return kind(items)
    except TypeError:  # a subclass with a constructor of its own (torch.return_types…)
        return tuple(items) if isinstance(nest, tuple) else items


def _with_values(
    nest: MutableMapping[Any, Any], values: dict[Any, Any]
) -> MutableMapping[Any, Any]:
    if type(nest) is dict:
        return values
    new = copy.copy(nest)  # keeps the class: OrderedDict, ModelOutput, BatchEncoding …
    for key, value in values.items():
        new[key] = value
    return new


def _is_dataclass(nest: object) -> bool:
    return dataclasses.is_dataclass(nest) and not isinstance(nest, type)


def _field_names(nest: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(nest) if hasattr(nest, field.name)]


def _with_fields(nest: Any, fields: dict[str, Any]) -> Any:
    new = copy.copy(nest)
    for name, value in fields.items():
        object.__setattr__(new, name, value)  # frozen dataclasses allow nothing else
    return new
