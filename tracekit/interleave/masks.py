"""The mask of an attention function as eager attention takes it: added to the scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.errors import AttentionError

_WANTED: Final = "load the model with attn_implementation='sdpa' or 'eager'"


def beside(eager: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """What makes a call of the model's eager function of what another one is given."""

    def with_its_mask(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *more: Any, **kwargs: Any
    ) -> Callable[[], Any]:
        added = additive_mask(module, query, key, mask, kwargs)
        if _implementation(module) == "sdpa":  # which leaves it out (4.57), or refuses it (5)
            kwargs.pop("softcap", None)
        return partial(eager, module, query, key, value, added, *more, **kwargs)

    return with_its_mask


def additive_mask(
    module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """What to add to the scores, `[batch, heads or 1, query, key]`; None where all see all.

    AttentionError for a mask of a kind that is not known.
    """
    if kwargs.get("cache") is not None:
        raise _refused(module, "keeps keys and values in pages")
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = mask[..., : key.shape[-2]]
        return _added(mask, query) if mask.dtype is torch.bool else mask
    name = _implementation(module)
    told = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if told is None else told)
    if mask is None and name == "sdpa":
        return _later(query, key) if is_causal and query.shape[2] > 1 else None
    allowed = _allowed(module, query, key, mask, is_causal, kwargs)
    return None if allowed is None else _added(allowed, query)


def _later(query: Tensor, key: Tensor) -> Tensor:
    """The least there is for every key behind a query, counted from the first."""
    size = (1, 1, query.shape[2], key.shape[2])
    lowest = torch.finfo(query.dtype).min
    return torch.full(size, lowest, dtype=query.dtype, device=query.device).triu_(1)


def _allowed(
    module: Any, query: Tensor, key: Tensor, mask: Any, is_causal: bool, kwargs: dict[str, Any]
) -> Tensor | None:
    """Which keys each query sees; None if all see all."""
    name = _implementation(module)
    places = _Places(query, key)
    if _is_flash(name) and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
        return _of_flash(module, places, mask, is_causal, kwargs)
    if hasattr(mask, "mask_mod"):
        return _of_flex(mask, query, key)
    if mask is not None:
        raise _refused(module, f"was given a mask of a kind that is not known ({_kind(mask)})")
    if name == "flex_attention" or not is_causal or query.shape[2] == 1:
        return None
    if query.shape[2] != key.shape[2] or kwargs.get("sliding_window") is not None:
        raise _refused(module, "was given no mask, and is not one of transformers")
    return places.sees(0)


@final
class _Places:
    """The places of queries and keys, counted from the first key."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.queries = torch.arange(query.shape[2], device=query.device)[:, None]
        self.keys = torch.arange(key.shape[2], device=query.device)[None, :]

    def sees(self, first: int) -> Tensor:
        """Whether each query sees each key that is not behind it, if the first is at `first`."""
        return (self.keys <= self.queries + first)[None, None]


def _of_flash(
    module: Any, places: _Places, mask: Tensor | None, is_causal: bool, kwargs: dict[str, Any]
) -> Tensor | None:
    """Flash attention aligns the last query with the last key, and is told of padding alone."""
    queries, keys = len(places.queries), places.keys.shape[1]
    if mask is None and _is_packed(kwargs):
        raise _refused(module, "was given several sequences in one row")
    window = kwargs.get("sliding_window")
    if mask is None and not is_causal and window is None:
        return None
    seen = keys if mask is None else mask.shape[1]  # a static kv_cache has room behind
    real = torch.ones(1, keys, dtype=torch.bool, device=places.keys.device)
    if mask is not None:
        real = torch.nn.functional.pad(mask.bool(), (0, keys - seen))
    own = real.long().cumsum(-1)  # padding is left out before windows are counted
    distance = own[:, None, seen - queries : seen, None] - own[:, None, None, :]
    allowed = real[:, None, None, :].expand_as(distance)
    if is_causal:
        allowed = allowed & places.sees(seen - queries)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    return allowed


def _is_packed(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    positions = kwargs.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[0] > 1:
        return False
    return bool((positions.diff() != 1).any())


def _of_flex(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    size = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return create_mask(mask.mask_mod, *size, device=str(query.device))


def _implementation(module: Any) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or ""


def _is_flash(name: str) -> bool:
    """Whether masks are made for the implementation of that name as for flash attention."""
    from transformers import masking_utils

    known: Any = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    flash = getattr(masking_utils, "flash_attention_mask", None)
    return name in known and known[name] is flash


def _added(allowed: Tensor, query: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(allowed, zero, torch.finfo(query.dtype).min)


def _kind(mask: Any) -> str:
    return f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__


def _refused(module: Any, why: str) -> AttentionError:
    name = _implementation(module)
    return AttentionError(
        f"the pattern of {type(module).__name__} can't be told: its attention function ({name}) "
        f"{why}; {_WANTED}. q, k, v and z can be had."
    )
