"""The mask of an attention function as eager attention takes it: added to the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit.errors import AttentionError


def additive_mask(
    module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """What to add to the scores, `[batch, heads or 1, query, key]`; None where all see all."""
    if mask is None:
        allowed = _causal(query, key) if _is_causal(module, query, kwargs) else None
        return None if allowed is None else _added(allowed, query)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise AttentionError(
            f"the attention function was given a mask of a kind that is not known "
            f"({type(mask).__name__}): its pattern can't be told. Load the model with "
            f"attn_implementation='sdpa' or 'eager'."
        )
    mask = mask[..., : key.shape[-2]]
    return _added(mask, query) if mask.dtype is torch.bool else mask


def _is_causal(module: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a missing mask means that a query sees no later key, as for sdpa."""
    told = kwargs.get("is_causal")
    told = getattr(module, "is_causal", True) if told is None else told
    return bool(told) and query.shape[2] > 1


def _causal(query: Tensor, key: Tensor) -> Tensor:
    ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return ones.tril()[None, None]


def _added(allowed: Tensor, query: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, torch.finfo(query.dtype).min)
