"""From what people have (text, ids, encodings, tensors) to the keyword tensors of a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from tracekit.capture import warn_user
from tracekit.core import offload
from tracekit.core.quirks import first_weight
from tracekit.errors import InputError
from tracekit.models.bos import Ends, tokenized_rows, warn_of_two
from tracekit.models.chats import is_chat, told_chats

_OF_READING: Final = ("prepend_bos", "append_eos", "padding_side")


def encode(
    given: Any, tokenizer: Any, side: Callable[[], str], ends: Ends | None = None
) -> dict[str, Any]:
    """The `input_ids`, `attention_mask` … that `given` stands for.

    `given` is a string, a list of strings, a conversation or a list of them, ids (a list, a list of
    lists, a tensor of one or two dimensions) or a mapping such as a tokenizer returns. Rows of
    different lengths are padded. Text begins and ends as `ends` says, a conversation as its
    template says.
    """
    ends = ends or Ends()
    if isinstance(given, Mapping):
        return {str(key): value for key, value in cast("Mapping[Any, Any]", given).items()}
    if isinstance(given, Tensor):
        return _from_tensor(given)
    if isinstance(given, str):
        return _tokenized(given, tokenizer, side(), ends)
    items = list(cast("Sequence[Any]", given)) if isinstance(given, Sequence) else None
    if not items:
        raise InputError(
            f"an input is a string, a list of strings, token ids, a tensor or an encoding, "
            f"not {'an empty list' if items == [] else type(given).__name__}."
        )
    if all(isinstance(item, str) for item in items):
        return _tokenized(items, tokenizer, side(), ends)
    if is_chat(items):
        texts = told_chats(items, tokenizer, ends)
        return _tokenized(texts, tokenizer, side(), replace(ends, is_rest=True))
    if all(isinstance(item, int) for item in items):
        return _from_tensor(torch.tensor([items]))
    return _from_rows([_row(item) for item in items], tokenizer, side())


def reading_of(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the arguments of one call, those that say how text becomes tokens, and all others."""
    reading = {name: kwargs[name] for name in _OF_READING if name in kwargs}
    side = reading.get("padding_side")
    if side not in (None, "left", "right"):
        raise InputError(f"padding_side= is 'left' or 'right', not {side!r}.")
    for name in _OF_READING[:2]:
        if reading.get(name) not in (None, True, False):
            raise InputError(
                f"{name}= is True, False or None (as the tokenizer does), not {reading[name]!r}."
            )
    return reading, {name: value for name, value in kwargs.items() if name not in reading}


def ends_of(reading: dict[str, Any], is_rest: bool = False) -> Ends:
    """What `reading` says of the two ends of a text."""
    if is_rest and reading.get("prepend_bos"):
        raise InputError(
            "what comes behind a prefix has no beginning: give prepend_bos= to model.prefill()."
        )
    return Ends(reading.get("prepend_bos"), reading.get("append_eos"), is_rest)


def texts_of(given: Any) -> list[str]:
    """The texts that an input is; none if it is something else."""
    if isinstance(given, str):
        return [given]
    items = list(cast("Sequence[Any]", given)) if isinstance(given, (list, tuple)) else []
    return items if all(isinstance(item, str) for item in items) else []


def warn_of_padding(given: object, tokenizer: Any, side: str) -> None:
    """Warn of ids that have padding on the side where the model has it, as nothing says so."""
    pad = getattr(tokenizer, "pad_token_id", None)
    if type(given) is not Tensor or given.dim() != 2 or pad is None or not given.numel():
        return
    edge = given[:, 0 if side == "left" else -1].tolist()
    if pad not in edge or pad == tokenizer.unk_token_id:
        return
    own = tokenizer.bos_token_id if side == "left" else tokenizer.eos_token_id
    if pad == own and not _is_twice(pad, given[:, :2] if side == "left" else given[:, -2:]):
        return  # once it is a token of the text
    warn_user(
        f"rows of these ids {'begin' if side == 'left' else 'end'} with the token of padding "
        f"({pad}), and ids alone don't say what is padding, so it is read as text: give the texts, "
        f"model.to_inputs(texts), or attention_mask=."
    )


def _is_twice(token: int, columns: Tensor) -> bool:
    return columns.shape[1] == 2 and bool((columns == token).all(1).any())


def device_of(module: nn.Module) -> torch.device | None:
    """Where the model wants its inputs: where its first weight is used. None if nothing says."""
    weight = first_weight(module)
    if weight is None or weight.is_meta or "_hf_hook" in vars(module):
        return offload.device_of(module)
    return weight.device


def on_device(inputs: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    """`inputs` with its tensors on `device`."""
    if device is None:
        return inputs
    return {
        key: value.to(device) if isinstance(value, Tensor) and value.device != device else value
        for key, value in inputs.items()
    }


def _tokenized(text: str | list[str], tokenizer: Any, side: str, ends: Ends) -> dict[str, Any]:
    if tokenizer is None:
        raise InputError("text needs a tokenizer: LanguageModel(module, tokenizer=…), or give ids.")
    texts = [text] if isinstance(text, str) else text
    if ends.is_rest or not ends.are_the_tokenizers:
        rows = tokenized_rows(texts, tokenizer, ends)
        encoded = _from_rows([_row(row) for row in rows], tokenizer, side)
    else:
        several = not isinstance(text, str)
        encoded = tokenizer(text, return_tensors="pt", padding=several, padding_side=side)
        encoded = dict(encoded)
    if not ends.is_rest and ends.bos is not False:
        warn_of_two(texts, tokenizer)
    return encoded


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
