"""Whole values of a model that lies on several ranks, made of shares, and cut into them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor

from tracekit.core.nest import map_leaves, named_tensors
from tracekit.core.sharding import WHOLE, Key, Sharding, Unlike
from tracekit.core.shares import Share
from tracekit.core.site import Site
from tracekit.errors import UnsupportedError


@final
class Values:
    """What modules take and give; `differs` compares with the other ranks, which all come to it."""

    def __init__(
        self, sharding: Sharding, differs: Callable[[Site, Sequence[Tensor]], bool]
    ) -> None:
        self._sharding = sharding
        self._differs = differs

    def whole(self, site: Site, value: Any) -> Any:
        """`value` with the whole of each share in it; UnsupportedError if one can't be told."""
        found: dict[int, Tensor] = {}
        unknown: list[Tensor] = []
        ranks = self._sharding.ranks
        for key, tensor in named_tensors(value):
            known = self._sharding.known(site, key)
            if isinstance(known, Unlike):
                raise _refused(site, key, known.why)
            if isinstance(known, Share):
                if not known.fits(tensor.shape, ranks.rank):
                    raise _refused(site, key, f"it has another shape here, {list(tensor.shape)}")
                found[id(tensor)] = known.gathered(tensor, ranks)
            elif known is not WHOLE or self._sharding.has_chance:
                unknown.append(tensor)
        if unknown and self._differs(site, unknown):
            raise _refused(site, (), "the ranks have different numbers there")
        return _exchanged(value, found)

    def cut(self, site: Site, value: Any) -> Any:
        """`value`, with this rank's share of what lies divided."""
        found: dict[int, Tensor] = {}
        for key, tensor in named_tensors(value):
            known = self._sharding.known(site, key)
            if isinstance(known, Share):
                found[id(tensor)] = known.cut(tensor, self._sharding.ranks)
        return _exchanged(value, found)


def _exchanged(value: Any, found: dict[int, Tensor]) -> Any:
    return map_leaves(lambda leaf: found.get(id(leaf), leaf), value) if found else value


def _refused(site: Site, key: Key, why: str) -> UnsupportedError:
    where = f" (at {', '.join(map(repr, key))})" if key else ""
    return UnsupportedError(
        f"{site}{where} can't be had of a model that lies on several ranks: {why}, and each has a "
        f"part of it alone. Ask for what a layer, its attention, its MLP or a projection gives or "
        f"is given, or load the model on one rank."
    )
