"""An attention that computes its pattern in its own forward, led through modules all the same."""

# Such a forward calls a softmax, or torch's fused function. Both are met by a mode that is entered
# around it. Of a softmax, q, k and v are not known: what they are called is the forward's own
# affair. z is what the first product with the pattern gives.

from __future__ import annotations

import math
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tracekit.interleave.attend import SOFTMAX, Pieces, attend, softmax_of, through_softmax

_PRODUCTS: Final = ("matmul", "bmm", "__matmul__")


@final
class OwnAttention(TorchFunctionMode):
    """Leads what the forward of one attention computes through `pieces`, while it is entered."""

    def __init__(self, pieces: Pieces, module: Any) -> None:
        super().__init__()
        self._pieces = pieces
        self._module = module
        self._pattern: torch.Size | None = None  # of the pattern whose product is to come

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        output = func(*args, **kwargs)
        if self._pattern is not None and getattr(func, "__name__", "") in _PRODUCTS:
            return self._product(args[0], output)
        return output

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        scores, softmax = softmax_of(func, args, kwargs)
        if scores.dim() != 4:
            return softmax(scores)
        keys = scores.shape[-1]
        pattern, _ = through_softmax(self._pieces, softmax, scores, scores.dtype, keys)
        self._pattern = pattern.shape
        return pattern

    def _product(self, pattern: Tensor, output: Tensor) -> Tensor:
        size = self._pattern
        if size is None or pattern.shape[-2:] != size[-2:] or pattern.numel() != size.numel():
            return output
        self._pattern = None
        if not self._pieces.is_wanted("z"):
            self._pieces.passed("z", None)
            return output
        z = output.reshape(*size[:3], -1).transpose(1, 2)
        z = z.clone() if z.requires_grad else z
        new = self._pieces.passed("z", z)
        is_same = new is z and not z.requires_grad
        return output if is_same else new.transpose(1, 2).reshape(output.shape).contiguous()

    def _fused(self, *args: Any, **kwargs: Any) -> Tensor:
        query, key, value, mask, dropout, is_causal = _fused_arguments(*args, **kwargs)
        options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        options |= {"dropout": dropout, "is_causal": is_causal}
        given = (self._module, query, key, value, mask)
        z = attend(self._pieces, _real, partial(partial, _by_hand), given, options)[0]
        return z.transpose(1, 2)


def _fused_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, dropout_p, is_causal


def _real(module: Any, *given: Any, dropout: float, **options: Any) -> tuple[Tensor]:
    z = F.scaled_dot_product_attention(*given, dropout_p=dropout, **options)
    return (z.transpose(1, 2),)


def _by_hand(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor]:
    """What torch's documentation says that its fused function computes."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, lowest)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = scores + mask
    pattern = F.dropout(F.softmax(scores, -1), dropout)
    return ((pattern @ value).transpose(1, 2),)
