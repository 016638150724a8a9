"""Numbers and labels as text: short, and with nothing invisible in it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

NOT_A_NUMBER: Final = "nan"
_SPACE: Final = "·"
_WORDS: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(label: str) -> str:
    """A label with its outer spaces as "·", line breaks as "\\n", and other invisible characters,
    those that would steer a terminal too, as their numbers; "∅" for an empty one."""
    if not label:
        return "∅"
    inner = label.strip(" ")
    before = len(label) - len(label.lstrip(" ")) if inner else len(label)
    behind = len(label) - before - len(inner)
    told = "".join(char if char.isprintable() else _escaped(char) for char in inner)
    return _SPACE * before + told + _SPACE * behind


def _escaped(char: str) -> str:
    return _WORDS.get(char, char.encode("unicode_escape").decode())


def exact(value: Any) -> str:
    """A number with the fewest digits that tell it from all others of its dtype (numpy's)."""
    return str(value)


def decimals_of(values: Iterable[float]) -> int | None:
    """How many decimals show three digits of the largest; None if it wants an exponent."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0:
        return 0
    order = math.floor(math.log10(largest))
    return max(0, 2 - order) if -2 <= order < 6 else None


def short(value: float, decimals: int | None) -> str:
    """A number in few characters, with so many decimals; None: with an exponent."""
    if not math.isfinite(value):
        return NOT_A_NUMBER if math.isnan(value) else "inf" if value > 0 else "-inf"
    if decimals is None:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits}e{int(exponent)}" if value else "0"
    told = f"{value:.{decimals}f}"
    return told.removeprefix("-") if float(told) == 0 else told


def brief(value: float) -> str:
    """A number that stands by itself, in three digits."""
    return short(value, decimals_of([value])) if value else "0"


def counted(count: int) -> str:
    """How many, as in "855.8 k" or "7.24 B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:.0f} {unit}"
            )
    return str(count)


def as_numbers(values: Tensor) -> Any:
    """A tensor as a numpy array of the same dtype, or float32 where numpy has none such."""
    plain = values.detach().cpu()
    if plain.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        plain = plain.float()
    return plain.resolve_conj().resolve_neg().numpy()
