"""Is every named value there, of its stated shape, and a view of the model's own tensor?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.findings import Claim
from tracekit.architectures.witness import ROOT, Testimony, Where, is_hookable, layers_of

# Names that may be parts of one tensor, and must not overlap then.
_APART = ("q", "k", "v", "mlp_pre", "mlp_pre_linear")


def presence(names: Names, seen: Testimony) -> Iterator[Claim]:
    """That each name has a value of the shape that it states, which is a view."""
    axes: dict[str, dict[str, int]] = {}
    for where in [ROOT, *layers_of(names)]:
        if where != ROOT and where.path not in names.layers:
            yield Claim(str(where), "", "it is of a kind that the family states", False)
            continue
        has_stages = where != ROOT and names.family.stacks[where.stack].has_stages
        place = where.path.rpartition(".")[0] if has_stages else where.stack
        known = axes.setdefault(place, {})
        for bound in names.points(where.path):
            if is_hookable(names, bound):
                yield from _of_one(names, where, bound, seen, known)
            else:
                yield Claim(str(where), bound.name, bound.shape, None, why="no module's own value")
        yield from _disjoint(where, seen)


def _of_one(
    names: Names, where: Where, bound: Bound, seen: Testimony, known: dict[str, int]
) -> Iterator[Claim]:
    found = seen.named.get((where, bound.name))
    if found is None:
        why = seen.problems.get((where, bound.name), f"{bound.path} did not run")
        yield Claim(str(where), bound.name, f"[{bound.shape}]", False, why=why)
        return
    sizes = names.layers[where.path].sizes
    shape = list(found.value.shape)
    why = misshapen(bound.shape, shape, {**known, **sizes})
    yield Claim(str(where), bound.name, f"[{bound.shape}], here {shape}", not why, why=why)
    if bound.shape == "batch pos model" and not why and len(shape) == 3:
        known.update(zip(("batch", "pos", "model"), shape, strict=True))
    if not found.is_view:
        yield Claim(str(where), bound.name, "a view of the module's tensor", False)


def misshapen(axes: str, shape: list[int], known: dict[str, int]) -> str:
    """Why a shape is not the stated one, given the sizes of some axes; "" if it is."""
    wanted = axes.split()
    if wanted[:2] == ["batch", "pos"] and len(shape) == len(wanted) - 1:
        wanted = ["batch*pos", *wanted[2:]]  # rows and positions in one axis
    if wanted[0] == "batch*pos" and len(shape) == len(wanted) + 1:
        wanted = ["batch", "pos", *wanted[1:]]
    if len(shape) != len(wanted):
        return f"{len(shape)} axes instead of {len(wanted)}"
    sizes = {**known, "batch*pos": known.get("batch", 0) * known.get("pos", 0)}
    for axis, size in zip(wanted, shape, strict=True):
        allowed = {sizes[each] for each in axis.split("|") if sizes.get(each)}
        if allowed and size not in allowed | ({1} if "1|" in axis else set()):
            return f"{axis} is {size}, not {min(allowed)}"
    return ""


def _disjoint(where: Where, seen: Testimony) -> Iterator[Claim]:
    parts = {name: seen.named[where, name] for name in _APART if (where, name) in seen.named}
    for (name, one), (other, another) in combinations(parts.items(), 2):
        if one.places and another.places and one.source == another.source:
            overlap = len(one.places & another.places)
            yield Claim(str(where), name, f"apart from {other}", not overlap, float(overlap))
