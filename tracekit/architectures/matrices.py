"""The matrix that a module multiplies with, read from it; or why there is none to be had."""

# Guarantees:
#   - `x @ weight + bias` is what the module computes: known of its class, or tried on numbers;
#   - what is quantised, sharded or not in memory is refused, never computed with.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.architectures.schema import Lacks
from tracekit.core.offload import at_hand
from tracekit.core.quirks import own_children
from tracekit.core.shares import whole_weight
from tracekit.errors import OffloadedError, UnsupportedError

_PLAIN = (Tensor, nn.Parameter)


class Matrix(NamedTuple):
    """A linear map `x @ weight + bias`, `weight` being `[in, out]`."""

    weight: Tensor
    bias: Tensor | None


def matrix_of(module: nn.Module, path: str) -> Matrix | Lacks:
    """What a linear module multiplies with and adds; views of its tensors, copies if offloaded."""
    module = at_hand(module)
    weight = whole_weight(getattr(module, "weight", None))
    bias = whole_weight(getattr(module, "bias", None))
    if not isinstance(weight, Tensor):
        return Lacks(f"{path} ({type(module).__name__}) has no weight")
    _check(weight, path)
    if weight.ndim != 2:
        return Lacks(f"the weight of {path} is no matrix, but {list(weight.shape)}")
    found = Matrix(weight if is_transposed(module) else weight.T, _tensor(bias))
    if not _is_linear(module) and not _is_so(module, found):
        kind = type(module).__name__
        return Lacks(f"{path} ({kind}) computes something else than x @ weight + bias")
    return found


def table_of(module: nn.Module, path: str) -> Tensor | Lacks:
    """What an embedding looks up, `[entries, model]`, as it gives it: scaled, if it scales."""
    module = at_hand(module)
    weight = whole_weight(getattr(module, "weight", None))
    if not isinstance(weight, Tensor):
        return Lacks(f"{path} ({type(module).__name__}) has no weight")
    _check(weight, path)
    scale = getattr(module, "embed_scale", None)
    return weight if scale is None else weight * _number(scale, weight)


def positions_of(module: nn.Module, path: str) -> Tensor | Lacks:
    """The embeddings of positions from 0 on, `[positions, model]`.

    OPT, BART and their heirs keep the first two rows for other uses, and say so in `offset`;
    RoBERTa begins behind the row of padding.
    """
    table = table_of(module, path)
    if isinstance(table, Lacks):
        return table
    padding = getattr(module, "padding_idx", None)
    offset = getattr(module, "offset", None if padding is None else padding + 1)
    return table if offset is None else table[offset:]


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is `[in, out]`: transformers' Conv1D, of GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def unfit(weight: Tensor) -> str | None:
    """Why a weight's numbers can't be computed with as they are; None if they can."""
    if type(weight) not in _PLAIN and not _is_fake(weight):
        return f"it is a {type(weight).__name__}, quantised or sharded"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"it is quantised, to {str(weight.dtype).removeprefix('torch.')}"
    return None


def _check(weight: Tensor, path: str) -> None:
    why = unfit(weight)
    if why is not None:
        raise UnsupportedError(
            f"the weight of {path} can't be read as numbers: {why}. Call the module instead, or "
            f"load the model without."
        )
    if weight.is_meta:
        raise OffloadedError(
            f"the weight of {path} is not in memory, and no hook on that module brings it."
        )


def _tensor(value: object) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _number(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or is_transposed(module)


def _is_so(module: nn.Module, matrix: Matrix) -> bool:
    """Whether a module of an unknown class computes with `matrix`, tried on a vector."""
    weight, bias = matrix
    if own_children(module):  # an adapter around a layer, say, whose part may be small
        return False
    if _is_fake(weight):
        return True  # a dry run has no numbers to try
    with torch.no_grad():
        x = torch.linspace(-1, 1, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
        expected = x @ weight if bias is None else x @ weight + bias
        try:
            found = type(module).forward(module, x)
        except (TypeError, RuntimeError, ValueError):
            return False
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        rounding = 8 * torch.finfo(weight.dtype).eps * (x.abs() @ weight.abs()).max()
        return bool((found - expected).abs().max() <= rounding)


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"
