"""Text as tokens, with or without the tokens of its beginning and its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from tracekit.capture import warn_user
from tracekit.errors import InputError


@final
@dataclass(frozen=True)
class Ends:
    """What stands at the two ends of a text; None: what the tokenizer puts there.

    A rest goes on from other text, and so has nothing of the tokenizer's. `limit` is how many
    tokens a row may have: its last ones are left out, but not those that the tokenizer puts at
    its end.
    """

    bos: bool | None = None
    eos: bool | None = None
    is_rest: bool = False
    limit: int | None = None

    @property
    def are_the_tokenizers(self) -> bool:
        """Whether a row is what the tokenizer makes of its text."""
        return self.bos is None and self.eos is None and self.limit is None


def tokenized_rows(texts: list[str], tokenizer: Any, ends: Ends) -> list[list[int]]:
    """The tokens of each text, not padded.

    With `ends.bos` the token is in front of each, once more only if it was not there; with False
    it is taken away where the tokenizer has put it there, and stays where the text itself has it.
    So is it with `ends.eos`, behind each.
    """
    _check(tokenizer, ends)
    return [_row(text, tokenizer, ends) for text in texts]


def warn_of_two(texts: Iterable[str], tokenizer: Any) -> None:
    """Warn of a text that begins as the tokenizer begins each text, as from a chat template."""
    begin = tokenizer.bos_token
    for text in texts:
        if not begin or not text.startswith(begin):
            continue
        if _count(_ids(text, tokenizer), tokenizer.bos_token_id) > _count(
            _ids(text, tokenizer, False), tokenizer.bos_token_id
        ):
            warn_user(
                f"the text begins with {begin!r}, and the tokenizer puts one more in front: "
                f"prepend_bos=False leaves it at the one of the text."
            )
            return


def warn_of_an_end(texts: list[str], tokenizer: Any) -> None:
    """Warn of texts that are to be gone on from, behind which the tokenizer puts their end."""
    end = tokenizer.eos_token
    if end and not texts[0].endswith(end) and puts_behind(tokenizer, texts[0]):
        warn_user(
            f"the tokenizer puts {end!r} behind the text, and the model goes on from there: "
            f"append_eos=False leaves it out, append_eos=True says that it is meant."
        )


def puts_in_front(tokenizer: Any, text: str = "a") -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token in front of a text."""
    before, _, _ = _parts(text, tokenizer)
    return bool(before) and before[0] == tokenizer.bos_token_id


def puts_behind(tokenizer: Any, text: str = "a") -> bool:
    """Whether the tokenizer puts its end-of-sequence token behind a text."""
    _, _, behind = _parts(text, tokenizer)
    return bool(behind) and behind[-1] == tokenizer.eos_token_id


def _check(tokenizer: Any, ends: Ends) -> None:
    for asked, name, token in ((ends.bos, "prepend_bos", "bos"), (ends.eos, "append_eos", "eos")):
        if asked and getattr(tokenizer, f"{token}_token_id") is None:
            raise InputError(
                f"{name}=True needs a tokenizer with {'an' if token == 'eos' else 'a'} "
                f"{token}_token, and {type(tokenizer).__name__} has none."
            )


def _row(text: str, tokenizer: Any, ends: Ends) -> list[int]:
    before, own, behind = _parts(text, tokenizer, ends.is_rest)
    if ends.bos is False and before[:1] == [tokenizer.bos_token_id]:
        before = before[1:]
    elif ends.bos and [*before, *own][:1] != [tokenizer.bos_token_id]:
        before = [tokenizer.bos_token_id, *before]
    if ends.eos is False and behind[-1:] == [tokenizer.eos_token_id]:
        behind = behind[:-1]
    elif ends.eos and [*own, *behind][-1:] != [tokenizer.eos_token_id]:
        behind = [*behind, tokenizer.eos_token_id]
    if ends.limit is not None:
        own = own[: max(0, ends.limit - len(before) - len(behind))]
    return [*before, *own, *behind]


def _parts(
    text: str, tokenizer: Any, is_rest: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer puts in front of a text, the text's own tokens, and what it puts behind.

    All are the text's own where it can't be told.
    """
    own = _ids(text, tokenizer, False)
    if is_rest:
        return [], own, []
    whole = _ids(text, tokenizer)
    bos = tokenizer.bos_token_id
    likely = 0 if bos is None else _count(whole, bos) - _count(own, bos)
    for start in (likely, *range(len(whole) - len(own) + 1)):
        if start >= 0 and whole[start : start + len(own)] == own:
            return whole[:start], own, whole[start + len(own) :]
    return [], whole, []


def _ids(text: str, tokenizer: Any, with_ends: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=with_ends)["input_ids"])


def _count(row: list[int], token: int) -> int:
    """How often the token stands in front of a row."""
    return next((index for index, each in enumerate(row) if each != token), len(row))
