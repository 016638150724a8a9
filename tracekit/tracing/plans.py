"""How activations are recorded: which values of modules, what is cut out, what must come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from tracekit.core.norms import Inside, epsilon_of
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import CacheError
from tracekit.tracing.sites import Cut, PosSlice, Sites, sites_of
from tracekit.tracing.wanted import Spot, keys_of, wanted


class Plan(NamedTuple):
    """How activations are recorded: by key, where, and which of the values must come."""

    spots: Mapping[str, Spot]
    sites: Sites
    named: set[str]


def everything(tree: Tree, derives: bool) -> Plan:
    """The plan for every name; found out once for a model."""
    keys = keys_of(tree)
    if keys is None:
        return plan_of(tree, wanted(tree, None), None, derives)
    if derives not in keys.plans:
        keys.plans[derives] = plan_of(tree, wanted(tree, None), None, derives)
    return keys.plans[derives]


def plan_of(tree: Tree, spots: Iterable[Spot] | None, pos_slice: PosSlice, derives: bool) -> Plan:
    """How these activations (None: all) are recorded; `derives` what is inside norms."""
    if spots is None and pos_slice is None:
        return everything(tree, derives)
    spots = wanted(tree, None) if spots is None else spots
    chosen = {spot.key: _derived(tree, spot) if derives else spot for spot in spots}
    whole = frozenset(spot.site for spot in chosen.values() if spot.named.bound.key is not None)
    cuts = _cuts(chosen.values(), pos_slice)
    sites = sites_of(tree, dict.fromkeys(spot.site for spot in chosen.values()), whole, cuts)
    return Plan(chosen, sites, {str(spot.site) for spot in chosen.values() if spot.is_named})


def _derived(tree: Tree, spot: Spot) -> Spot:
    """What is inside a norm, out of what the norm is given; any other as it is."""
    owner, _, name = spot.site.path.rpartition(".")
    kind = tree.norm_kinds.get(owner)
    if spot.site.path not in tree.inner or kind is None:
        return spot
    inside = Inside(kind, epsilon_of(tree.modules[owner]), name == "norm_scale")
    bound = replace(spot.named.bound, path=owner, slot=Slot.INPUT, view=inside)
    named = replace(spot.named, bound=bound)
    return replace(spot, site=Site(owner, Slot.INPUT), named=named)


def _cuts(spots: Iterable[Spot], pos_slice: PosSlice) -> dict[Site, Cut]:
    """What of each value is kept; a name without an axis of positions alone is kept whole."""
    if pos_slice is None:
        return {}
    spots = list(spots)
    flat = [each.site.path for each in spots if "*pos" in each.named.bound.shape]
    cuts: dict[Site, Cut] = {}
    for spot in spots:
        axis, shape = spot.named.axis, spot.named.bound.shape
        if not shape:
            raise CacheError(
                f"pos_slice= can't be applied to {spot.key}, a module by path: leave it out of "
                f"names_filter=."
            )
        path = spot.site.path  # what is inside a norm lies as what the norm is given
        is_flat = any(path == each or path.startswith(f"{each}.norm_") for each in flat)
        if axis is not None and not is_flat:
            cuts[spot.site] = Cut(pos_slice, axis)
    return cuts
