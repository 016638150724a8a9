"""From tokens to text, token by token, and to where a token stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor

from tracekit.errors import InputError, TokenError

_SPACE = "▁"  # SentencePiece's mark of a space in front


def text_of(tokens: Any, tokenizer: Any, known: int) -> str | list[str]:
    """The text of a token or a row of them; of rows, a list.

    `known` is how many tokens the model knows, or the tokenizer.
    """
    if _is_nested(tokens):
        return [_decode(row, tokenizer, known) for row in _rows(tokens)]
    return _decode(_row(tokens), tokenizer, known)


def strings_of(tokens: Any, tokenizer: Any, known: int) -> list[str]:
    """The text of each token of one row, alone."""
    return [string_of(token, tokenizer, known) for token in _row(tokens)]


def string_of(token: int, tokenizer: Any, known: int) -> str:
    """The text of one token, with the space in front that decoding it alone would take off."""
    text = _decode([token], tokenizer, known)
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str) or not piece.startswith(_SPACE):
        return text
    return " " * (len(piece) - len(piece.lstrip(_SPACE))) + text.lstrip(" ")


def single_token(text: object, tokenizer: Any) -> int:
    """The one token that a text is; TokenError if it is more, or none."""
    if not isinstance(text, str):
        raise InputError(f"a single token is asked for by its text, not {type(text).__name__}.")
    ids = _bare(text, tokenizer)
    if ids == [tokenizer.unk_token_id] and text.strip() != tokenizer.unk_token:
        raise TokenError(
            f"{text!r} is not among the tokens that the model knows: it would read "
            f"{tokenizer.unk_token!r}, as for any other such word."
        )
    if len(ids) == 1:
        return ids[0]
    pieces = ", ".join(repr(string_of(token, tokenizer, 0)) for token in ids)
    what = f"{len(ids)} tokens ({pieces}), not one" if ids else "no token at all"
    near = [each for each in _respaced(text) if len(_bare(each, tokenizer)) == 1]
    cure = f"; {near[0]!r} is one" if near else ""
    raise TokenError(
        f"{text!r} is {what}{cure}. model.to_str_tokens(text) shows the tokens of a text."
    )


def place_of(token: int, row: Sequence[int], mode: str, shown: str) -> int:
    """Where a token stands in a row, the first time or the last; TokenError if it does not."""
    if mode not in ("first", "last"):
        raise InputError(f"mode= is 'first' or 'last', not {mode!r}.")
    places = [index for index, each in enumerate(row) if each == token]
    if not places:
        raise TokenError(
            f"{shown} (token {token}) is not among the {len(row)} tokens of the input; a word has "
            f"other tokens with a space in front than without: model.to_str_tokens(input) shows "
            f"them."
        )
    return places[0] if mode == "first" else places[-1]


def row_of(tokens: Any) -> list[int]:
    """The tokens of one row: a list, an array or a tensor of shape `[pos]` or `[1, pos]`."""
    if not _is_nested(tokens):
        return _row(tokens)
    rows = _rows(tokens)
    if len(rows) != 1:
        raise InputError(f"one row of tokens is wanted here, and {len(rows)} were given.")
    return rows[0]


def is_tokens(given: object) -> bool:
    """Whether this is a token, or tokens in an array or a tensor."""
    return isinstance(given, (int, np.integer, Tensor, np.ndarray))


def _bare(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _respaced(text: str) -> list[str]:
    """The text with a space in front, or without."""
    return [text.lstrip(" ")] if text.startswith(" ") else [f" {text}"]


def _decode(row: list[int], tokenizer: Any, known: int) -> str:
    known = max(known, len(tokenizer))
    strange = [token for token in row if not 0 <= token < known]
    if strange:
        raise TokenError(f"{strange[0]} is no token: there are {known}, from 0 to {known - 1}.")
    return tokenizer.decode(row, clean_up_tokenization_spaces=False)


def _is_nested(tokens: Any) -> bool:
    if isinstance(tokens, (Tensor, np.ndarray)):
        return tokens.ndim == 2
    first = next(iter(tokens), None) if isinstance(tokens, (list, tuple)) else None
    is_row = isinstance(first, (Tensor, np.ndarray)) and first.ndim == 1
    return is_row or isinstance(first, (list, tuple))


def _rows(tokens: Any) -> list[list[int]]:
    return [_row(row) for row in tokens]


def _row(tokens: Any) -> list[int]:
    """The tokens of one row, or the one token that is given."""
    found = tokens.tolist() if isinstance(tokens, (Tensor, np.ndarray)) else tokens
    if isinstance(found, (int, np.integer)):
        found = [int(found)]
    if isinstance(found, (list, tuple)):
        row = [_whole(token) for token in cast("Sequence[object]", found)]
        if None not in row:
            return cast("list[int]", row)
    kind = type(tokens).__name__
    if isinstance(tokens, (Tensor, np.ndarray)):
        kind = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
    raise InputError(
        f"tokens are integers: one, a row of them, or rows, as a list, an array or a tensor; "
        f"not {kind}."
    )


def _whole(token: object) -> int | None:
    if isinstance(token, Tensor) and token.ndim == 0 and not token.is_floating_point():
        return int(token)
    is_whole = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
    return int(cast("int", token)) if is_whole else None
