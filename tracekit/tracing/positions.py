"""Which positions of a sequence are meant: `"prompt"`, `"generated"`, `"all"`, or by number."""

# Numbers count a row's own tokens from 0, padding left out, so that each row of a batch is what it
# is alone. Negative ones count back from the end of the prompt: it is the only end that every
# forward knows, whether keys and values are kept or not.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor

from tracekit.errors import InputError
from tracekit.tracing.timeline import PADDING

Positions: TypeAlias = "str | int | slice | range | Sequence[int] | Tensor"

_NAMES = ("prompt", "generated", "all")


@final
class Chosen:
    """The positions that `given` means."""

    def __init__(self, given: Positions) -> None:
        self.given = given
        self._name = given if isinstance(given, str) else None
        self._slice = given if isinstance(given, slice) else None
        self._numbers = [] if self._name or self._slice is not None else _numbers(given)
        if self._name is not None and self._name not in _NAMES:
            raise _unknown(given)
        if self._slice is not None:
            _check_slice(self._slice)

    @property
    def count(self) -> int | None:
        """How many positions of a row are meant, where that is plain."""
        return len(self._numbers) or None

    @property
    def counts_back(self) -> bool:
        """Whether it is counted from the end of the prompt."""
        ends = [self._slice.start or 0, self._slice.stop or 0] if self._slice is not None else []
        return any(number < 0 for number in [*self._numbers, *ends])

    def places(self, own: Tensor, start: int, prompt: int, own_prompt: Tensor) -> Tensor:
        """`[rows, length]`: the how-manieth of the chosen ones each position is; PADDING: none.

        `own`: `[rows, length]`, each one's place in its row; `start`: the column of the first;
        `prompt`: the first column behind the prompt; `own_prompt`: `[rows]`, how many tokens of
        each row come before that.
        """
        if self._numbers:
            return self._places_of_numbers(own, own_prompt)
        columns = torch.arange(start, start + own.shape[1])
        is_chosen = own != PADDING
        first, step = torch.zeros_like(own_prompt)[:, None], 1
        if self._name == "prompt":
            is_chosen = is_chosen & (columns < prompt)
        elif self._name == "generated":
            is_chosen, first = is_chosen & (columns >= prompt), own_prompt[:, None]
        elif self._slice is not None:
            first = _bound(self._slice.start or 0, own_prompt).clamp(min=0)  # as Python's slices
            step = self._slice.step or 1
            is_chosen = is_chosen & (own >= first) & ((own - first) % step == 0)
            if self._slice.stop is not None:
                is_chosen = is_chosen & (own < _bound(self._slice.stop, own_prompt))
        return torch.where(is_chosen, (own - first) // step, PADDING)

    def _places_of_numbers(self, own: Tensor, own_prompt: Tensor) -> Tensor:
        found = torch.full_like(own, PADDING)
        for place, number in enumerate(self._numbers):
            is_there = (own == _bound(number, own_prompt)) & (own != PADDING)
            found = torch.where(is_there, place, found)
        return found

    def __repr__(self) -> str:
        return repr(self._numbers) if self._numbers else repr(self.given)


def _numbers(given: Any) -> list[int]:
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, bool):
        raise _unknown(given)
    if isinstance(given, int):
        return [given]
    if isinstance(given, (range, Sequence)):
        numbers = list(cast("Sequence[Any]", given))
        if numbers and all(
            isinstance(each, int) and not isinstance(each, bool) for each in numbers
        ):
            return numbers
    raise _unknown(given)


def _check_slice(given: slice) -> None:
    parts: list[Any] = [given.start, given.stop, given.step]
    is_plain = all(part is None or isinstance(part, int) for part in parts)
    if not is_plain or (given.step is not None and given.step < 1):
        raise _unknown(given)


def _bound(number: int, own_prompt: Tensor) -> Tensor:
    """`[rows, 1]`: the own position that a number means in each row."""
    return (own_prompt + number if number < 0 else torch.full_like(own_prompt, number))[:, None]


def _unknown(given: object) -> InputError:
    return InputError(
        f"positions are 'prompt', 'generated', 'all', a number, a slice, or a list of numbers, not "
        f"{given!r}."
    )
