"""From the tokens of a generation, as they come, to text that no later token will change."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Final, final

from torch import Tensor

_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@final
class RowOfText:
    """The text of one row, told as it becomes certain.

    Only the tokens since the text was last certain are decoded, and those just before it: a step
    costs the same throughout, and a token that begins with a space keeps it.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._tokens: list[int] = []  # those before the text was last certain, and since then
        self._told = 0

    def add(self, tokens: list[int]) -> str:
        """The text that has become certain with `tokens`."""
        self._tokens += tokens
        text = self._decode(self._tokens)
        return "" if self._is_open(text) else self._tell(text)

    def end(self) -> str:
        """What was held back, as no more tokens come."""
        return self._tell(self._decode(self._tokens))

    def _tell(self, text: str) -> str:
        new = _behind(self._decode(self._tokens[: self._told]), text)
        if new:
            self._tokens = self._tokens[self._told :]
            self._told = len(self._tokens)
        return new

    def _is_open(self, text: str) -> bool:
        """Whether the last token of `text` may be a part of a character that others complete.

        The bytes of some tokenizers (`<0xE2>`) are read anew with each that follows.
        """
        last = self._tokenizer.convert_ids_to_tokens(self._tokens[-1])
        is_byte = isinstance(last, str) and _BYTE.fullmatch(last) is not None
        return is_byte or text.endswith("\N{REPLACEMENT CHARACTER}")

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )


@final
class Texts:
    """The texts of all rows: a string in each step for one row, unless `is_listed`, else a list."""

    def __init__(self, tokenizer: Any, *, is_listed: bool, skip_special_tokens: bool) -> None:
        self._make_row = partial(RowOfText, tokenizer, skip_special_tokens)
        self._is_listed = is_listed
        self._rows: list[RowOfText] = []

    def add(self, tokens: Tensor) -> str | list[str]:
        """The texts that have become certain with `tokens`, of shape (rows, tokens)."""
        self._rows = self._rows or [self._make_row() for _ in tokens]
        rows = zip(self._rows, tokens.tolist(), strict=True)
        return self._shown([row.add(ids) for row, ids in rows])

    def end(self) -> str | list[str] | None:
        """What was held back, if anything was."""
        held = [row.end() for row in self._rows]
        return self._shown(held) if any(held) else None

    def _shown(self, texts: list[str]) -> str | list[str]:
        return texts if self._is_listed or len(texts) > 1 else texts[0]


def is_list_of_texts(given: Any) -> bool:
    """Whether a prompt is a list of rows, which may be one."""
    return isinstance(given, (list, tuple)) and not all(isinstance(each, int) for each in given)


def _behind(known: str, text: str) -> str:
    """What `text` has beyond what it shares with `known`, which it most likely begins with."""
    if text.startswith(known):
        return text[len(known) :]
    pairs = enumerate(zip(known, text, strict=False))
    shared = next((index for index, (one, other) in pairs if one != other), len(text))
    return text[shared:]
