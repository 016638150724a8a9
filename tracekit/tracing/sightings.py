"""What every module is given and gives, as plain hooks see it that stand outside all others."""

# These are PyTorch's own hooks, registered in PyTorch's own way, behind whatever changes values:
# they know neither blocks nor edits, so what they saw can be held against what those say.

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, final
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from tracekit.core.nest import tensors
from tracekit.core.pieces import Piece
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.core.versions import UNKNOWN, changes
from tracekit.interleave.hooks import is_elsewhere
from tracekit.interleave.worker import this_thread

# Is shown each value: its place in the run, where it is, and what it is.
See: TypeAlias = "Callable[[int, Seen, Any], None]"


class Seen(NamedTuple):
    """A value in a run: the how-manieth of its site it is."""

    site: Site
    call: int


@contextmanager
def watched(
    tree: Tree, see: See, counts: Counter[Site], is_apart: Callable[[], bool] | None = None
) -> Generator[None]:
    """Let `see` see what each module of a model is given and gives, on this thread.

    Calls while `is_apart` are none of the run.
    """
    watch = _Watch(this_thread(), see, counts, is_apart)
    handles: list[Any] = []
    try:
        for path, module in tree.called.items():
            if type(module) is not Piece:
                handles += watch.on(path, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        watch.see = None


@final
class _Watch:
    """The hooks of one run."""

    def __init__(
        self, thread: int, see: See, counts: Counter[Site], is_apart: Callable[[], bool] | None
    ) -> None:
        self._thread = thread
        self._is_apart = is_apart
        self._counts = counts
        self.see: See | None = see
        self._order = 0

    def on(self, path: str, module: nn.Module) -> list[Any]:
        """Hooks at both ends of a module."""
        before, after = partial(self._before, path), partial(self._after, path)
        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def _before(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._saw(Site(path, Slot.INPUT), (args, kwargs))

    def _after(self, path: str, _: nn.Module, args: Any, output: Any) -> None:
        self._saw(Site(path, Slot.OUTPUT), output)

    def _saw(self, site: Site, value: Any) -> None:
        if self.see is None or is_elsewhere(self._thread):
            return
        if self._is_apart is not None and self._is_apart():
            return
        order, self._order = self._order, self._order + 1
        seen = Seen(site, self._counts[site])
        self._counts[site] += 1
        self.see(order, seen, value)


@final
class Kept:
    """One tensor as it was: its numbers, or where there was no room for them, a digest."""

    __slots__ = ("_digest", "shape", "value")

    def __init__(self, tensor: Tensor, has_room: bool) -> None:
        self.shape = tensor.shape
        self.value = copied(tensor) if has_room else None
        self._digest = None if has_room else _digest(tensor)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same bits."""
        if self.value is None:
            return tensor.shape == self.shape and _digest(tensor) == self._digest
        return is_same(self.value, tensor.detach().cpu())


@final
class Clean:
    """All values of the run without edits, in order; a tensor that is seen twice is kept once.

    Numbers are kept until they take `budget` bytes, and digests of all that comes behind.
    """

    def __init__(self, budget: float, is_watched: Callable[[str], bool]) -> None:
        self.values: dict[Seen, list[Kept]] = {}
        self.counts: Counter[Site] = Counter()
        self.without_numbers = 0
        self._room = budget
        self._is_watched = is_watched
        self._known: dict[int, tuple[ReferenceType[Tensor], int, Kept]] = {}

    def see(self, _: int, seen: Seen, value: Any) -> None:
        """Keep a value."""
        if self._is_watched(seen.site.path):
            self.values[seen] = [self._kept(tensor) for tensor in tensors(value)]

    def close(self) -> None:
        """The run is over."""
        self._known.clear()

    def _kept(self, tensor: Tensor) -> Kept:
        version = changes(tensor)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version != UNKNOWN:
            return known[2]
        size = tensor.numel() * tensor.element_size()
        made = Kept(tensor, size <= self._room)
        if made.value is None:
            self.without_numbers += 1
        else:
            self._room -= size
        self._known[id(tensor)] = ref(tensor), version, made
        return made


def copied(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, on the CPU, in memory of their own."""
    found = tensor.detach()
    return found.to("cpu", copy=True) if found.device.type != "cpu" else found.clone()


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit by bit; a NaN is itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    found = tensor.contiguous()
    return found.as_strided((found.numel(),), (1,)).view(torch.uint8)


def _digest(tensor: Tensor) -> bytes:
    there = _bits(tensor.detach().cpu())
    return hashlib.blake2b(there.numpy().tobytes(), digest_size=16).digest()
