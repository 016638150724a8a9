"""Kinds of objects that can change: what is in one, one made anew, and whether it has changed."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, Final

_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made by Python code
_MAPPINGS: Final = (dict, OrderedDict, defaultdict, Counter)


def kind_of(value: Any) -> str:
    if type(value) is list:
        return "list"
    if type(value) is dict:
        return "dict"
    if type(value) is set:
        return "set"
    if type(value) in _MAPPINGS:
        return "mapping"
    if type(value) is deque:
        return "deque"
    if _is_a(value, "torch", "Tensor"):
        return "tensor"
    if _is_a(value, "numpy", "ndarray"):
        return "array"
    return "instance" if _is_plain(value) else "opaque"


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether it is one of a library that has been imported; if it has not, it can't be one."""
    library = sys.modules.get(module)
    return library is not None and isinstance(value, getattr(library, name))


def _is_plain(value: object) -> bool:
    """Whether an object is all in its `__dict__`, and is made again by filling it."""
    cls = type(value)
    every = [each for each in cls.__mro__ if each is not object]
    is_usual = (
        cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and all(each.__flags__ & _HEAP_TYPE for each in every)
        and not any(each.__dict__.get("__slots__") for each in every)
        and hasattr(value, "__dict__")
    )
    if not is_usual or any(hasattr(cls, name) for name in ("__getnewargs__", "__getnewargs_ex__")):
        return False
    if _is_a(value, "torch.nn", "Module"):  # it has a __setstate__ for pickles of old versions
        return "__getstate__" not in vars(cls)
    own = getattr(cls, "__getstate__", None) is getattr(object, "__getstate__", None)
    return own and not hasattr(cls, "__setstate__")


def _pairs(value: Any) -> tuple[Any, ...]:
    return tuple(value.keys()), tuple(value.values())


CONTENT: Final[Mapping[str, Callable[[Any], tuple[Any, ...]]]] = {
    "list": tuple,
    "set": tuple,
    "deque": tuple,
    "dict": _pairs,
    "mapping": _pairs,
    "instance": lambda value: _pairs(vars(value)),
}


def _refill_mapping(mine: Any, content: Any) -> None:
    mine.clear()
    for key, value in zip(*content, strict=True):
        mine[key] = value


def _refill_list(mine: Any, content: Any) -> None:
    mine.clear()
    mine.extend(content)


def _refill_set(mine: Any, content: Any) -> None:
    mine.clear()
    mine.update(content)


def _refill_array(mine: Any, content: Any) -> None:
    mine[...] = content


REFILL: Final[Mapping[str, Callable[[Any, Any], None]]] = {
    "list": _refill_list,
    "deque": _refill_list,
    "set": _refill_set,
    "dict": _refill_mapping,
    "mapping": _refill_mapping,
    "instance": lambda mine, content: _refill_mapping(vars(mine), content),
    "array": _refill_array,
}


def _mapping(head: tuple[Any, Any]) -> Any:
    kind, default_factory = head
    return kind(default_factory) if kind is defaultdict else kind()


EMPTY: Final[Mapping[str, Callable[[Any], Any]]] = {
    "list": lambda _: [],
    "set": lambda _: set(),
    "dict": lambda _: {},
    "deque": lambda size: deque(maxlen=size),
    "mapping": _mapping,
    "instance": object.__new__,
}
WHOLE: Final = ("opaque", "tensor", "array")


# -- what changed ---------------------------------------------------------------------------------


def snapshot(value: Any, state_of: Callable[[Any], object]) -> object:
    """How an object is now, for `has_changed`; it holds what is in it, and copies nothing."""
    kind = kind_of(value)
    if kind in CONTENT:
        return CONTENT[kind](value)
    if kind == "tensor":
        return state_of(value)
    return hash(value.tobytes()) if kind == "array" else None


def has_changed(value: Any, before: Any, state_of: Callable[[Any], object]) -> bool:
    """Whether an object holds something else than it did."""
    kind = kind_of(value)
    after: Any = snapshot(value, state_of)
    if kind in CONTENT and kind != "set":
        return not _is_same(before, after)
    return set(before) != set(after) if kind == "set" else before != after


def _is_same(one: Any, other: Any) -> bool:
    """Whether tuples, and tuples in them, hold the very same objects."""
    if type(one) is tuple and type(other) is tuple:
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one is other
