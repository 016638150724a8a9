"""Text as tokens with, or without, the beginning-of-sequence token in front."""

from __future__ import annotations

from typing import Any

from tracekit.errors import InputError


def tokenized_rows(texts: list[str], tokenizer: Any, prepend_bos: bool) -> list[list[int]]:
    """The tokens of each text, not padded.

    With `prepend_bos` the token is in front of each, once more only if it was not there; without,
    it is taken away where the tokenizer has put it there, and stays where the text itself has it.
    """
    bos: int | None = tokenizer.bos_token_id
    rows: list[list[int]] = [list(tokenizer(text)["input_ids"]) for text in texts]
    if prepend_bos and bos is not None:
        return [row if row[:1] == [bos] else [bos, *row] for row in rows]
    if prepend_bos:
        raise InputError(
            f"prepend_bos=True needs a tokenizer with a bos_token, and "
            f"{type(tokenizer).__name__} has none."
        )
    plain = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return [
        row[1:] if _leading(row, bos) > _leading(own, bos) else row
        for row, own in zip(rows, plain, strict=True)
    ]


def _leading(row: list[int], bos: int | None) -> int:
    """How often the token stands in front of a row."""
    return next((index for index, token in enumerate(row) if token != bos), len(row))
