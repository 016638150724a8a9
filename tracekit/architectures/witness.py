"""Look at a model's named values with plain PyTorch hooks, and write to one of them by hand."""

# Nothing here knows how tracekit reads or writes in a trace, so that each can be held against the
# other. What is seen is copied at once: some models overwrite their values later.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.schema import Sharing
from tracekit.core.nest import first_input, first_tensor, replace_tensor, tensors
from tracekit.core.site import Slot

Run = Callable[[], Any]


@dataclass(frozen=True)
class Where:
    """A layer: the stack, its index there, path, and which call of it; the model itself: ""."""

    stack: str
    index: int
    path: str
    call: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.index}" if self.stack else "model"


ROOT = Where("", 0, "", 0)


@dataclass(frozen=True)
class Seen:
    """A named value: a copy, when it came, and whether it is a view of the module's tensor."""

    value: Tensor
    order: int
    is_view: bool
    source: tuple[str, Slot, int | None]  # the module, and which tensor of it
    places: frozenset[int]  # which elements of that tensor it is, unless it is all


@dataclass(frozen=True)
class Write:
    """`delta` is added to one named value."""

    where: Where
    name: str
    delta: Tensor


@final
@dataclass
class Testimony:
    """What was seen in one run of a model."""

    named: dict[tuple[Where, str], Seen] = field(default_factory=dict[tuple[Where, str], Seen])
    # By path, slot and call: the first tensor that a module was given or gave.
    raw: dict[tuple[str, Slot, int], Tensor] = field(
        default_factory=dict[tuple[str, Slot, int], Tensor]
    )
    problems: dict[tuple[Where, str], str] = field(default_factory=dict[tuple[Where, str], str])
    result: Any = None
    calls: Counter[str] = field(default_factory=Counter[str])

    def value(self, where: Where, name: str) -> Tensor | None:
        found = self.named.get((where, name))
        return None if found is None else found.value


def layers_of(names: Names) -> list[Where]:
    """Every layer of every stack, in order."""
    return [
        Where(stack, index, *place)
        for stack, places in names.stacks.items()
        for index, place in enumerate(places)
    ]


def is_hookable(names: Names, bound: Bound) -> bool:
    """Whether the value is a module's own, so that a plain hook sees it."""
    return bound.path in names.modules


def observe(names: Names, run: Run, write: Write | None = None, raw: bool = False) -> Testimony:
    """Run the model once, look at everything that has a name, and make at most one `write`."""
    found = Testimony()
    with _hooks(names, found, write, raw):
        found.result = run()
    return found


# -- hooks --------------------------------------------------------------------------------------


@final
class _Watch:
    """The hooks of one run: each notes what is named at its module, and makes the write."""

    def __init__(self, names: Names, found: Testimony, write: Write | None, raw: bool) -> None:
        self._found, self._write, self._raw = found, write, raw
        self._at: dict[tuple[str, Slot, int], list[tuple[Where, Bound]]] = {}
        for where in [ROOT, *layers_of(names)]:
            for bound in names.points(where.path):
                if is_hookable(names, bound):
                    site = (bound.path, bound.slot, where.call + bound.call)
                    self._at.setdefault(site, []).append((where, bound))
        self.paths = {path for path, _, _ in self._at}
        if raw:
            self.paths |= {
                path for layer in names.layers.values() for path in layer.modules.values()
            }

    def before(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._see((path, Slot.INPUT, self._found.calls[path]), (args, kwargs))

    def after(self, path: str, _: nn.Module, __: Any, output: Any) -> Any:
        call = self._found.calls[path]
        self._found.calls[path] += 1
        return self._see((path, Slot.OUTPUT, call), output)

    def _see(self, site: tuple[str, Slot, int], value: Any) -> Any:
        here = self._at.get(site, [])
        written = next((bound for where, bound in here if self._is_written(where, bound)), None)
        new = value if written is None else self._changed(written, value)
        for where, bound in here:
            # What is written for this module alone, others do not see.
            is_beside = written is not None and written.sharing is Sharing.APART
            is_apart = is_beside and bound is not written
            _note(self._found, where, bound, value if is_apart else new)
        tensor = first_tensor(first_input(value) if site[1] is Slot.INPUT else value)
        if self._raw and tensor is not None:
            self._found.raw[site] = tensor.detach().clone()
        return None if written is None else new

    def _is_written(self, where: Where, bound: Bound) -> bool:
        write = self._write
        return write is not None and (write.where, write.name) == (where, bound.name)

    def _changed(self, bound: Bound, value: Any) -> Any:
        old = tensor_in(bound, value)
        assert old is not None
        assert self._write is not None
        if bound.sharing is Sharing.SHARED:
            bound.view(old).add_(self._write.delta)
            return value
        new = old.clone()
        bound.view(new).add_(self._write.delta)
        return replace_tensor(value, old, new)


@contextmanager
def _hooks(names: Names, found: Testimony, write: Write | None, raw: bool) -> Generator[None]:
    watch = _Watch(names, found, write, raw)
    handles: list[Any] = []
    try:
        for path in watch.paths:
            module = names.modules[path]
            before, after = partial(watch.before, path), partial(watch.after, path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensor_in(bound: Bound, value: Any) -> Tensor | None:
    """The tensor of a module's inputs or output that a named value lies in."""
    if bound.slot is Slot.INPUT:
        value = first_input(value)
    if bound.key is None:
        return first_tensor(value)
    every = list(tensors(value))
    return every[bound.key] if bound.key < len(every) else None


def _note(found: Testimony, where: Where, bound: Bound, value: Any) -> None:
    key = (where, bound.name)
    tensor = tensor_in(bound, value)
    if tensor is None:
        found.problems[key] = "the module has no such tensor here"
        return
    try:
        view = bound.view(tensor)
    except Exception as error:  # noqa: BLE001 - a layout that does not fit is what is looked for
        found.problems[key] = f"its layout does not fit {list(tensor.shape)}: {error}"
        return
    shares = view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    source = (bound.path, bound.slot, bound.key)
    found.named[key] = Seen(
        view.detach().clone(), len(found.named), shares, source, _places(bound, tensor)
    )


def _places(bound: Bound, tensor: Tensor) -> frozenset[int]:
    if bound.is_plain or bound.slot is Slot.INPUT:
        return frozenset()
    numbers = torch.arange(tensor.numel()).view(tensor.shape)
    return frozenset(bound.view(numbers).flatten().tolist())
