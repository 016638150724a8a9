"""Which values a backward pass comes to, and why it does not come to others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from tracekit.core.nest import describe
from tracekit.core.origins import origin_of


class Edge(NamedTuple):
    """Where the gradient of a tensor arrives: an output of a node of autograd's graph."""

    node: Any
    output: int


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor that requires grad."""
    found = get_gradient_edge(tensor)
    return Edge(found.node, found.output_nr)


def is_reached(target: object, start: Iterable[Any]) -> bool:
    """Whether the gradients of `target` are computed from those of the nodes in `start`.

    Goes outwards from `start`, so it is quick for what is near.
    """
    seen = set(start)
    ahead = deque(seen)
    while ahead:
        node = ahead.popleft()
        if node is target:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)
    return False


def name_of(tensor: Tensor) -> str:
    """What an error calls `tensor`: the visit where a block got it, or its shape and operation."""
    origin = origin_of(tensor)
    if origin is not None and origin.label is not None:
        return str(origin.label)
    base = origin_of(tensor._base) if tensor._base is not None else None
    if base is not None and base.label is not None:
        return f"a view of {base.label}"
    made_by = "a leaf" if tensor.is_leaf else type(tensor.grad_fn).__name__
    return f"{describe(tensor)} ({made_by})"


def why_no_graph(tensor: Tensor) -> str:
    """Why `tensor` does not require grad, and what to do about it."""
    origin = origin_of(tensor)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return "only floating-point values have gradients"
    if tensor.is_inference():
        return "it was computed in inference mode: leave torch.inference_mode() out"
    if origin is not None and not origin.had_grad:
        return (
            "it was computed without grad: leave torch.no_grad() out (model.generate() always "
            "computes so; trace() the tokens that it generated)"
        )
    if not torch.is_grad_enabled():
        return (
            "it does not require grad, as it was computed without grad: leave torch.no_grad() out "
            "(model.generate() always computes so; trace() the tokens that it generated)"
        )
    return (
        "it does not require grad: it was detached, or computed under torch.no_grad(), or from "
        "nothing that does (frozen parameters: make an early value the leaf of the graph, as in "
        "model.transformer.wte.output.requires_grad_(True))"
    )


def why_not_reached(tensor: Tensor) -> str:
    """Why a loss does not depend on `tensor`, which requires grad."""
    if tensor.is_leaf:
        return "the loss was not computed from it"
    if tensor._is_view():  # pyright: ignore[reportPrivateUsage] - the one way to ask
        return (
            "it is a view that was taken of another tensor, and the model goes on with that "
            "one: take .grad of the whole tensor, and the part of that"
        )
    return "the loss was not computed from it: a copy of a value is not what the model goes on with"
