"""From what people have (text, ids, encodings, tensors) to the keyword tensors of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tracekit.core.quirks import first_weight
from tracekit.errors import InputError
from tracekit.models.bos import tokenized_rows


def encode(
    given: Any,
    tokenizer: Any,
    side: Callable[[], str],
    prepend_bos: bool | None = None,
    is_rest: bool = False,
) -> dict[str, Any]:
    """The `input_ids`, `attention_mask` … that `given` stands for.

    `given` is a string, a list of strings, ids (a list, a list of lists, a tensor of one or two
    dimensions) or a mapping such as a tokenizer returns. Rows of different lengths are padded.
    Text has its beginning-of-sequence token as `prepend_bos` says; None: as the tokenizer does.
    The text of a rest goes on from other text, so it gets no token of its beginning or end.
    """
    if isinstance(given, Mapping):
        return {str(key): value for key, value in cast("Mapping[Any, Any]", given).items()}
    if isinstance(given, Tensor):
        return _from_tensor(given)
    if isinstance(given, str):
        return _tokenized(given, tokenizer, side(), prepend_bos, is_rest)
    items = list(cast("Sequence[Any]", given)) if isinstance(given, Sequence) else None
    if not items:
        raise InputError(
            f"an input is a string, a list of strings, token ids, a tensor or an encoding, "
            f"not {'an empty list' if items == [] else type(given).__name__}."
        )
    if all(isinstance(item, str) for item in items):
        return _tokenized(items, tokenizer, side(), prepend_bos, is_rest)
    if all(isinstance(item, int) for item in items):
        return _from_tensor(torch.tensor([items]))
    return _from_rows([_row(item) for item in items], tokenizer, side())


def reading_of(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the arguments of one call, those that say how text becomes tokens, and all others."""
    reading = {name: kwargs[name] for name in ("prepend_bos", "padding_side") if name in kwargs}
    side, bos = reading.get("padding_side"), reading.get("prepend_bos")
    if side not in (None, "left", "right"):
        raise InputError(f"padding_side= is 'left' or 'right', not {side!r}.")
    if bos not in (None, True, False):
        raise InputError(
            f"prepend_bos= is True, False or None (as the tokenizer does), not {bos!r}."
        )
    return reading, {name: value for name, value in kwargs.items() if name not in reading}


def device_of(module: nn.Module) -> torch.device | None:
    """Where the model wants its inputs; None if accelerate moves them itself."""
    weight = first_weight(module)
    return None if weight is None or weight.is_meta else weight.device


def on_device(inputs: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    """`inputs` with its tensors on `device`."""
    if device is None:
        return inputs
    return {
        key: value.to(device) if isinstance(value, Tensor) and value.device != device else value
        for key, value in inputs.items()
    }


def _tokenized(
    text: str | list[str], tokenizer: Any, side: str, prepend_bos: bool | None, is_rest: bool
) -> dict[str, Any]:
    if tokenizer is None:
        raise InputError("text needs a tokenizer: LanguageModel(module, tokenizer=…), or give ids.")
    several = not isinstance(text, str)
    if is_rest and prepend_bos:
        raise InputError(
            "what comes behind a prefix has no beginning: give prepend_bos= to model.prefill()."
        )
    if prepend_bos is not None and not is_rest:
        rows = tokenized_rows(text if several else [text], tokenizer, prepend_bos)
        return _from_rows([_row(row) for row in rows], tokenizer, side)
    options: dict[str, Any] = {"add_special_tokens": False} if is_rest else {}
    return dict(tokenizer(text, return_tensors="pt", padding=several, padding_side=side, **options))


def _from_tensor(ids: Tensor) -> dict[str, Any]:
    if ids.dim() not in (1, 2) or ids.is_floating_point() or not ids.numel():
        raise InputError(
            f"token ids are integers of shape (positions) or (batch, positions), not "
            f"{ids.dtype} of shape {tuple(ids.shape)}; pass other tensors by keyword."
        )
    ids = ids if ids.dim() == 2 else ids[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _row(item: Any) -> list[int]:
    if isinstance(item, Tensor) and item.dim() == 1 and not item.is_floating_point():
        item = item.tolist()
    if (
        isinstance(item, Sequence)
        and item
        and all(isinstance(token, int) for token in cast("Any", item))
    ):
        return list(cast("Sequence[int]", item))
    raise InputError(
        f"a list of inputs holds strings alone or rows of token ids alone, and this one holds "
        f"{'an empty row' if isinstance(item, Sequence) and not item else type(item).__name__}."
    )


def _from_rows(rows: list[list[int]], tokenizer: Any, side: str) -> dict[str, Any]:
    length = max(len(row) for row in rows)
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    padded = [_padded(row, length, pad, side) for row in rows]
    mask = [_padded([1] * len(row), length, 0, side) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def _padded(row: list[int], length: int, value: int, side: str) -> list[int]:
    fill = [value] * (length - len(row))
    return fill + row if side == "left" else row + fill
