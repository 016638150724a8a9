"""Keep the gradients that backward passes bring to recorded values."""

# A hook of the graph's node, rather than of the tensor, comes last: behind what a block, or a hook
# of the user's, put in the place of a gradient. The graph holds these hooks; what they fill they
# hold weakly, and that holds a gradient and no graph. So nothing here refers to itself.

from __future__ import annotations

from functools import partial
from typing import Any, final
from weakref import ReferenceType, ref

from torch import Tensor

from tracekit.core.keep import Keep
from tracekit.core.nest import Nest, map_leaves
from tracekit.core.origins import Part, origin_of
from tracekit.tracing.reach import edge_of


@final
class Arrival:
    """The gradient of one tensor: the sum over all backward passes, as torch's `.grad` is."""

    __slots__ = ("__weakref__", "gradient")

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Take what one pass brought."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


def await_gradients(value: Nest, keep: Keep) -> tuple[Nest, list[Any]]:
    """`value` with an Arrival in the place of each tensor that requires grad, and None elsewhere.

    And the nodes that only the caller holds until the model goes on with the value.
    """
    nodes: list[Any] = []

    def awaited(leaf: Any) -> Arrival | None:
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return None
        arrival = Arrival()
        origin = origin_of(leaf)
        rows = origin.rows if origin is not None else None
        edge = edge_of(leaf if rows is None else rows.base)
        part = None if rows is None else rows.part
        edge.node.register_prehook(partial(_take, ref(arrival), edge.output, part, keep))
        if leaf.is_leaf or (rows is not None and rows.base.is_leaf):
            nodes.append(edge.node)
        return arrival

    return map_leaves(awaited, value), nodes


def _take(
    arrival: ReferenceType[Arrival],
    output: int,
    part: Part | None,
    keep: Keep,
    gradients: tuple[Tensor | None, ...],
) -> None:
    found, gradient = arrival(), gradients[output]
    if found is not None and gradient is not None:
        if part is not None:
            gradient = part.of(gradient)
        kept = keep.tensor(gradient.detach())
        # A parameter's .grad may become this very tensor, and is added to in place.
        found.add(kept.clone() if keep.shares(gradient) else kept)
