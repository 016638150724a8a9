"""A padded batch gives every row what the row alone gives, or is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit.core.quirks import is_before_5
from tracekit.errors import PaddingError
from tracekit.models.signatures import accepts

# Families whose state runs through padding, whatever the mask says (transformers 4.57 to 5.23).
READS_PADDING = frozenset({"rwkv", "xlstm"})
READS_PADDING_BEFORE_5 = frozenset({"recurrent_gemma"})
# Encoders that count positions from the first column, where they cannot be told otherwise.
COUNTS_PADDING = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "distilbert",
        "led",
        "marian",
        "mbart",
        "pegasus",
        "plbart",
    }
)


def fit_padding(inputs: dict[str, Any], module: Any, for_generate: bool) -> dict[str, Any]:
    """`inputs`, with `position_ids` counted from each row's first token where the model takes them.

    `generate` counts them itself. Raises PaddingError where a row would not be what it is alone.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return inputs
    refuse_what_is_wrong(module, mask, for_generate)
    return inputs if for_generate else with_positions(inputs, module)


def with_positions(inputs: dict[str, Any], module: Any) -> dict[str, Any]:
    """`inputs`, with positions by row if their mask has padding, and the model takes them."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return inputs
    if "position_ids" in inputs or not accepts(module, "position_ids"):
        return inputs
    if hasattr(getattr(module, "model", module), "get_rope_index"):
        return inputs  # its positions have three axes, and it derives them from the mask
    return {**inputs, "position_ids": positions_of(module, mask)}


def refuse_what_is_wrong(module: Any, mask: Tensor, for_generate: bool) -> None:
    """PaddingError for padding with which a row would not be what it is alone."""
    config = module.config
    family = config.model_type
    if family in READS_PADDING or (family in READS_PADDING_BEFORE_5 and is_before_5()):
        raise PaddingError(
            f"{family} reads its padding: in a padded batch its rows would not be what each is "
            f"alone. Trace the rows one by one, or give rows of equal length."
        )
    is_told = accepts(module, "position_ids")
    if family in COUNTS_PADDING and not is_told and not bool(mask[:, 0].all()):
        raise PaddingError(
            f"{family} counts positions from the first column, so rows padded on the left would "
            f"not be what each is alone: LanguageModel(..., padding_side='right')."
        )
    if for_generate and not config.is_encoder_decoder and not bool(mask[:, -1].all()):
        raise PaddingError(
            "a decoder generates behind the last column, so rows padded on the right would go on "
            "from padding: LanguageModel(..., padding_side='left')."
        )


def positions_of(module: Any, mask: Tensor) -> Tensor:
    """Each token's place in its own row, from 0, or from where the family's positions begin."""
    counted = mask.long().cumsum(-1)
    if module.config.model_type == "paligemma":
        return torch.clamp(counted, min=1)
    unused = _unused_position(module)
    if unused is not None:
        return counted * mask.long() + unused
    return torch.clamp(counted - 1, min=0)


def context_length(module: Any) -> int | None:
    """How many positions the model was made for; None where it knows no bound."""
    config: Any = getattr(module, "config", None)
    if config is None:
        return None
    for part in (config, config.get_text_config()):
        length = getattr(part, "max_position_embeddings", None)
        if isinstance(length, int):
            unused = _unused_position(module)
            return length if unused is None else length - unused - 1
    return None


def _unused_position(module: Any) -> int | None:
    """That of padding, in RoBERTa and its heirs: they count from behind it."""
    for part in module.modules():
        if hasattr(part, "padding_idx") and hasattr(part, "position_embeddings"):
            return part.padding_idx
    return None
