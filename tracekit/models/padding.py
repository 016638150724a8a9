"""A padded batch gives every row what the row alone gives, or is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit.errors import PaddingError
from tracekit.models.signatures import accepts

# Families whose state runs through padding, whatever the mask says (transformers 4.57 to 5.23).
READS_PADDING = frozenset({"rwkv", "xlstm"})
# Encoders that count positions from the first column, and cannot be told otherwise.
COUNTS_PADDING = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
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
    _refuse_what_is_wrong(module.config, mask, for_generate)
    if for_generate or "position_ids" in inputs or not accepts(module, "position_ids"):
        return inputs
    if hasattr(getattr(module, "model", module), "get_rope_index"):
        return inputs  # its positions have three axes, and it derives them from the mask
    return {**inputs, "position_ids": _positions(module, mask)}


def _refuse_what_is_wrong(config: Any, mask: Tensor, for_generate: bool) -> None:
    family = config.model_type
    if family in READS_PADDING:
        raise PaddingError(
            f"{family} reads its padding: in a padded batch its rows would not be what each is "
            f"alone. Trace the rows one by one, or give rows of equal length."
        )
    if family in COUNTS_PADDING and not bool(mask[:, 0].all()):
        raise PaddingError(
            f"{family} counts positions from the first column, so rows padded on the left would "
            f"not be what each is alone: LanguageModel(..., padding_side='right')."
        )
    if for_generate and not config.is_encoder_decoder and not bool(mask[:, -1].all()):
        raise PaddingError(
            "a decoder generates behind the last column, so rows padded on the right would go on "
            "from padding: LanguageModel(..., padding_side='left')."
        )


def _positions(module: Any, mask: Tensor) -> Tensor:
    """Each token's place in its own row, from 0, or from where the family's positions begin."""
    counted = mask.long().cumsum(-1)
    for part in module.modules():
        if hasattr(part, "create_position_ids_from_input_ids"):  # RoBERTa's heirs: behind the pad
            return counted * mask.long() + part.padding_idx
    return torch.clamp(counted - 1, min=0)
