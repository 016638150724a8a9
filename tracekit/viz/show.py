"""`show(thing)`: the picture that fits what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from tracekit.analysis import Axis, Labelled
from tracekit.errors import InputError
from tracekit.viz.heat import heat_of
from tracekit.viz.picture import Picture


@final
class Show:
    """A Picture of what tracekit hands out: in a notebook, in a terminal, as a file.

    `show(found)` for labelled numbers.
    """

    def __call__(
        self,
        thing: Any,
        *,
        title: str | None = None,
        low: float | None = None,
        high: float | None = None,
        panels: str | None = None,
    ) -> Picture:
        """The picture of `thing`; `low` and `high` are the ends of its colours.

        InputError, which says what can be shown, for anything else.
        """
        if isinstance(thing, Labelled):
            parts = heat_of(thing, low, high, panels)
            return Picture(_heading(thing) if title is None else title, parts)
        raise InputError("no")

    def tokens(
        self,
        strings: Sequence[str],
        values: Tensor | Sequence[float],
        *,
        what: str = "",
        title: str | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Picture:
        """Running text with a number for each token, as its colour; `what` says of what."""
        numbers = torch.as_tensor(values)
        if numbers.shape != (len(strings),):
            raise InputError(
                f"{len(strings)} tokens, and values of shape {list(numbers.shape)}: "
                f"one number for each token."
            )
        found = Labelled(numbers, [Axis("position", tuple(strings))], what)
        return self(found, title=what if title is None else title, low=low, high=high)


def _heading(found: Labelled) -> str:
    return f"{found.what or 'values'}, by {' and '.join(found.names)}"


show = Show()
