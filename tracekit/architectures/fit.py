"""Does a declaration fit a model? Told when names are first asked for, from weights' shapes alone.

A checkpoint may say another number of heads than its projections have, or a class of the user's may
bear the model type of a family. What can't be so is not handed out. The numbers are another matter:
`model.check_names(input)` proves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor, nn

from tracekit.architectures.layouts import Heads, Sizes
from tracekit.architectures.matrices import is_transposed
from tracekit.architectures.schema import Declared, Lacks, Point
from tracekit.core.site import Slot

_PROJECTIONS: Final = ("q", "k", "v", "z")  # each with its layout by heads


def misfits(
    known: Mapping[str, str],
    declared: Mapping[str, Declared],
    sizes: Sizes,
    modules: Mapping[str, nn.Module],
) -> dict[str, Lacks]:
    """Activations that can't be as declared, and why, of a layer with modules `known` by word."""
    widths = dict(_widths(known, declared, sizes, modules))
    found = {name: Lacks(_indivisible(*each)) for name, each in widths.items() if each[1] % each[2]}
    q, k = widths.get("q"), widths.get("k")
    if not found and q is not None and k is not None and q[1] // q[2] != k[1] // k[2]:
        why = f"{q[0]} has {q[1]} features for {q[2]} heads, and {k[0]} has {k[1]} for {k[2]}"
        found = {name: Lacks(f"{why}: heads of different widths") for name in ("q", "k")}
    return found


def _widths(
    known: Mapping[str, str],
    declared: Mapping[str, Declared],
    sizes: Sizes,
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """By activation: the path of its projection, the features there, and the number of heads."""
    for name in _PROJECTIONS:
        point = declared.get(name)
        if not isinstance(point, Point) or not isinstance(point.layout, Heads) or point.inside:
            continue
        path = known.get(point.module)
        module = modules.get(path) if path is not None else None
        weight = getattr(module, "weight", None)
        heads = sizes.get(point.layout.count)
        if path is None or module is None or heads is None or not isinstance(weight, Tensor):
            continue
        if weight.ndim == 2 and weight.is_floating_point():  # quantised ones may be packed
            is_last = (point.slot is Slot.OUTPUT) == is_transposed(module)
            yield name, (path, weight.shape[-1 if is_last else 0], heads)


def _indivisible(path: str, features: int, heads: int) -> str:
    return f"{path} has {features} features, which {heads} heads can't share"
