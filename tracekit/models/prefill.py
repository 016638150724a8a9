"""Read a prompt once: run the model on it, and keep what later runs can begin with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tracekit.core.tree import Tree
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.behind import start_of
from tracekit.models.kv_layers import WITH_STATES, check_shareable, kind_of, layers_of, settle
from tracekit.models.prefix import Prefix, Source, empty_mask
from tracekit.models.probing import check_continues
from tracekit.models.signatures import accepts
from tracekit.tracing.call import Follower

# Families with states that were found to go on rightly from a filled cache (transformers 5.23).
# Mamba-1 and Jamba do not, behind which more than one token is wrong; nor does Bamba. How far they
# are off depends on the weights: of others with states it can't be told from a few tokens.
CONTINUES: Final = frozenset(
    {"falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "qwen3_next", "zamba2"}
)
# Families whose prompt reads itself in both directions: its keys depend on what follows.
READS_AHEAD: Final = frozenset({"paligemma"})
_MEDIA: Final = ("pixel_values", "pixel_values_videos", "input_features", "input_values")

Run = Callable[[dict[str, Any]], Any]  # inputs to outputs


def prefill(model: Any, tree: Tree, inputs: dict[str, Any], run: Run) -> Prefix:
    """The prefix that `run` makes of `inputs`, for `model` with its `tree`."""
    module = model.module
    _check_prompt(module, inputs)
    decodes = bool(module.config.is_encoder_decoder)
    if decodes and inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = _start(module, inputs)
    name = "decoder_" if decodes else ""
    tokens = inputs[f"{name}input_ids"]
    mask = inputs.get(f"{name}attention_mask")
    positions = _places(module, inputs)
    if positions is not None:
        inputs["position_ids"] = positions
    inputs["use_cache"] = True
    if not decodes and accepts(module, "logits_to_keep"):
        inputs.setdefault("logits_to_keep", 1)
    outputs = run(inputs)
    kv_cache = _kv_cache_of(module, outputs)
    check_shareable(kv_cache)
    _check_filled(module, kv_cache, tokens.shape[1])
    found = Prefix(
        model,
        kv_cache,
        tokens.clone(),
        empty_mask(tokens) if mask is None else mask.clone(),
        positions=positions,
        source=Source(outputs.encoder_last_hidden_state, _source_mask(inputs)) if decodes else None,
        has_media=any(inputs.get(each) is not None for each in _MEDIA) and not decodes,
    )
    check_continues(model, tree, found, inputs)
    return found


def extended(prefix: Prefix, inputs: dict[str, Any], run: Run) -> Prefix:
    """The longer prefix that `run` makes of `inputs`, which hold the rest behind `prefix`."""
    name = "decoder_" if prefix.source is not None else ""
    rest = inputs.get(f"{name}input_ids")
    if rest is None:
        raise InputError("prefix.extend() takes token ids or text, not inputs_embeds.")
    rows, length = rest.shape[0], len(prefix) + rest.shape[1]
    mask = inputs.get(f"{name}attention_mask")
    inputs = dict(inputs)
    if not name and accepts(prefix.model.module, "logits_to_keep"):
        inputs.setdefault("logits_to_keep", 1)
    outputs = run(inputs)
    kv_cache = _kv_cache_of(prefix.model.module, outputs)
    settle(kv_cache)
    _check_filled(prefix.model.module, kv_cache, length)
    tokens = torch.cat([prefix.tokens.expand(rows, -1), rest], 1)
    found = Prefix(
        prefix.model,
        kv_cache,
        tokens,
        empty_mask(tokens) if mask is None else mask,
        positions=None,
        source=prefix.source if prefix.rows == rows else _repeated(prefix.source, rows),
        has_media=prefix.has_media,
    )
    found.positions = prefix.positions_with(found.attention_mask)
    if prefix.is_plain and prefix.source is None and prefix.rows == rows:
        prefix.share(found)
    return found


def beginning(follower: Follower | None) -> Follower | None:
    """`follower`, that knows that the end of this prompt is not that of the texts behind it."""
    if follower is not None:
        follower.timeline.is_beginning = True
    return follower


def _check_prompt(module: Any, inputs: dict[str, Any]) -> None:
    family = module.config.model_type
    text = module.config.get_text_config(decoder=True)
    if family in READS_AHEAD or getattr(text, "use_bidirectional_attention", None):
        raise UnsupportedError(
            f"{family} reads its prompt in both directions, so the keys and values of a prefix "
            f"depend on what follows it. Trace the whole text instead."
        )
    if inputs.get("use_cache") is False:
        raise InputError("prefill() keeps keys and values: leave use_cache=False out.")
    if not module.config.is_encoder_decoder and not isinstance(inputs.get("input_ids"), Tensor):
        raise InputError("prefill() takes text or token ids; others would not know its tokens.")


def _start(module: Any, inputs: dict[str, Any]) -> Tensor:
    """The token with which decoding starts, for every row."""
    start = start_of(module)
    if start is None:
        raise InputError(
            f"{type(module).__name__} does not say with which token its decoder starts: give "
            f"model.prefill(source, decoder_input_ids=...)."
        )
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    return torch.full((first.shape[0], 1), int(start), device=first.device)


def _source_mask(inputs: dict[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


def _places(module: Any, inputs: dict[str, Any]) -> Tensor | None:
    """Positions on several axes, where the model has them: those of images are two-dimensional."""
    inner = getattr(module, "model", module)
    if not hasattr(inner, "get_rope_index") or not accepts(module, "position_ids"):
        return None
    if "position_ids" in inputs:
        return inputs["position_ids"]
    if not any(inputs.get(name) is not None for name in _MEDIA):
        mask = inputs.get("attention_mask")
        mask = empty_mask(inputs["input_ids"]) if mask is None else mask
        return (mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    taken = set(inspect.signature(inner.get_rope_index).parameters)
    given = {name: value for name, value in inputs.items() if name in taken}
    return inner.get_rope_index(**given)[0]


def _kv_cache_of(module: Any, outputs: Any) -> Any:
    for name in ("past_key_values", "cache_params"):
        found = getattr(outputs, name, None)
        if found is not None:
            return found
    raise UnsupportedError(
        f"{type(module).__name__} returns no keys and values that another run could begin with. "
        f"Trace the whole text instead."
    )


def _check_filled(module: Any, kv_cache: Any, length: int) -> None:
    """UnsupportedError if runs would not go on rightly from what was kept."""
    family = module.config.model_type
    kinds = {kind_of(layer) for layer in layers_of(kv_cache)}
    if kinds & WITH_STATES and family not in CONTINUES:
        raise UnsupportedError(
            f"{family} is not known to go on rightly from states that are there: in transformers "
            f"5.23 Mamba-1, Jamba and Bamba compute something else behind a filled cache. Trace "
            f"the whole text instead."
        )
    if kinds and not kinds & WITH_STATES and int(kv_cache.get_seq_length()) != length:
        raise UnsupportedError(
            f"{type(module).__name__} kept {int(kv_cache.get_seq_length())} positions of a prompt "
            f"of {length} tokens, so a rest would not know where it stands. Trace the whole text."
        )


def _repeated(source: Source | None, rows: int) -> Source | None:
    if source is None:
        return None
    mask = source.attention_mask
    hidden = source.hidden.expand(rows, -1, -1)
    return Source(hidden, None if mask is None else mask.expand(rows, -1))
