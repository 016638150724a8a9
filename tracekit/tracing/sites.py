"""Values of modules to be recorded each by itself: one tensor of each, or the part of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

from torch import Tensor, nn

from tracekit.core.nest import first_input, first_tensor
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import CacheError

# Which positions: one keeps its axis, as a slice does.
PosSlice: TypeAlias = "int | slice | list[int] | Tensor | None"


@final
@dataclass(frozen=True)
class Sites:
    """The modules by slot and path; of which values all tensors are kept, and what is cut out."""

    modules: Mapping[Slot, dict[str, nn.Module]]
    whole: frozenset[Site]
    cuts: Mapping[Site, Cut]

    @cached_property
    def asked(self) -> list[str]:
        """Each value, as a cache of them has it."""
        return [str(Site(path, slot)) for slot in self.modules for path in self.modules[slot]]

    def of_interest(self, site: Site, value: Any) -> Any:
        """What is kept of a value: its first tensor (None if there is none), or all of it."""
        if site in self.whole:
            return value
        return tensor_in(site.slot, value)

    def cut(self, site: Site, value: Any) -> Any:
        """The positions of a tensor that are kept, in memory of their own."""
        cut = self.cuts.get(site)
        return value if cut is None else cut.of(value).clone()


@final
@dataclass(frozen=True)
class Cut:
    """Positions out of the axis that has them."""

    positions: PosSlice
    axis: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`; CacheError if there are no such positions."""
        index = self.positions
        index = slice(index, index + 1 or None) if isinstance(index, int) else index
        try:
            found = tensor[(slice(None),) * self.axis + (index,)]
        except IndexError:
            found = None
        if found is None or 0 in found.shape[self.axis : self.axis + 1]:
            raise CacheError(
                f"pos_slice={self.positions!r} chooses nothing out of "
                f"{tensor.shape[self.axis]} positions."
            )
        return found


def sites_of(tree: Tree, sites: Iterable[Site], whole: frozenset[Site], cuts: Any = None) -> Sites:
    """The values at these places of a model."""
    modules: dict[Slot, dict[str, nn.Module]] = {Slot.OUTPUT: {}, Slot.INPUT: {}}
    for path, slot in sites:
        modules[slot][path] = tree.modules[path]
    return Sites(modules, whole, cuts or {})


def tensor_in(slot: Slot, value: Any) -> Tensor | None:
    """The tensor that is meant where none is named: the first input, or the first of an output."""
    if slot is Slot.OUTPUT:
        return first_tensor(value)
    first = first_input(value)
    return first if isinstance(first, Tensor) else first_tensor(value)
