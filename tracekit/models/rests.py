"""A rest, and whether it can go on from a prefix: its rows, its padding, what else is given."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tracekit.errors import InputError, PaddingError, UnsupportedError
from tracekit.models.padding import refuse_what_is_wrong
from tracekit.models.prefix import Prefix
from tracekit.models.signatures import accepts

# Families that know a token's place without position_ids, whatever padding lies before it.
_PLACED_BY_MASK: Final = frozenset({"bloom"})
_MEDIA: Final = ("pixel_", "image_", "video_", "input_features", "input_values", "feature_")


def of_decoder(rest: dict[str, Any], prefix: Prefix) -> dict[str, Any]:
    """The rest, as what the decoder reads where an encoder has read the prefix's source."""
    if prefix.source is None:
        return rest
    if "decoder_input_ids" in rest and "input_ids" in rest:
        raise InputError(
            "the encoder has read its input, and the prefix holds what it made of it: give the "
            "decoder's ids alone, model.trace(decoder_input_ids=rest, prefix=prefix)."
        )
    names = {"input_ids": "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
    is_decoders = "decoder_input_ids" in rest
    return rest if is_decoders else {names.get(key, key): value for key, value in rest.items()}


def check_rest(rest: dict[str, Any]) -> None:
    """InputError for what says otherwise than a prefix; UnsupportedError for images in a rest."""
    for name in ("past_key_values", "cache_params", "encoder_outputs"):
        if rest.get(name) is not None:
            raise InputError(f"{name}= and prefix= both say what came before: give one of them.")
    if rest.get("use_cache") is False:
        raise InputError(
            "use_cache=False means that keys and values are not used, and a prefix consists of "
            "them: leave it out, or give the whole text without prefix=."
        )
    if rest.get("cache_implementation") is not None:
        raise InputError(
            "cache_implementation= says which cache to begin with, and a prefix is one: leave it "
            "out, or give it to model.prefill(prompt, past_key_values=...)."
        )
    media = [name for name in rest if name.startswith(_MEDIA)]
    if media:
        raise UnsupportedError(
            f"{media[0]}= belongs into the prompt of the prefix: where its tokens stand in a rest "
            f"can't be told. Write model.prefill(..., {media[0]}=...)."
        )


def check_rows(rows: int, prefix: Prefix) -> None:
    """InputError if the rows of a rest do not belong to those of the prefix."""
    if prefix.rows not in {1, rows}:
        raise InputError(
            f"this prefix has {prefix.rows} rows, and the rest {rows}: give a rest for each row, "
            f"in their order, or a prefix of one row, which serves any number of rests."
        )


def check_gap(module: Any, prefix: Prefix, mask: Tensor, for_generate: bool) -> None:
    """PaddingError if the model would take padding behind the prefix for tokens."""
    if bool(mask.all()):
        return
    refuse_what_is_wrong(module, mask, for_generate and prefix.source is None)
    is_padded = not bool(mask[:, len(prefix) :].all())
    if prefix.is_stateful and is_padded:
        why = "its states run through padding"
    elif not _has_gap(mask) or (_knows_places(module) and not _has_window(module, prefix)):
        return
    else:
        why = "it counts columns, and those of the padding too"
    raise PaddingError(
        f"{module.config.model_type} can't have padding between a prefix and what follows it: "
        f"{why}. Give rests of one length, or run them one by one."
    )


def _has_gap(mask: Tensor) -> bool:
    """Whether padding lies between tokens of a row."""
    before = mask.cumsum(-1) > 0
    after = mask.flip(-1).cumsum(-1).flip(-1) > 0
    return bool(((mask == 0) & before & after).any())


def _knows_places(module: Any) -> bool:
    return accepts(module, "position_ids") or module.config.model_type in _PLACED_BY_MASK


def _has_window(module: Any, prefix: Prefix) -> bool:
    """Whether some layer reads a window of columns."""
    config = module.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    is_local = "local" in (getattr(config, "attention_layers", None) or ())
    return is_local or any(each is not None for each in named) or not prefix.is_plain


def joined_mask(prefix: Prefix, rest: Tensor, shown: Tensor) -> Tensor:
    """The attention mask of the prefix, and behind it that of a rest, whose tokens are `shown`."""
    if rest.dim() != 2 or rest.shape != shown.shape[:2]:
        raise InputError(
            f"the attention_mask behind a prefix is of the rest alone, and of shape "
            f"{tuple(shown.shape[:2])} here, not {tuple(rest.shape)}: the prefix brings its own."
        )
    before = prefix.attention_mask.to(rest.device, rest.dtype)
    return torch.cat([before.expand(rest.shape[0], -1), rest], 1)


def first_of(inputs: dict[str, Any], *names: str) -> Tensor | None:
    """The first of these inputs that is given."""
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)
