"""The call that a trace runs, and how many steps it will have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

EndStep: TypeAlias = Callable[[], None]


def one_step() -> int:
    """How many steps a forward pass has."""
    return 1


@final
@dataclass(frozen=True)
class TracedCall:
    """`make` makes the call, given what to call at the end of each decoding iteration.

    `count_steps` tells before the call how many it will have; StepError where that is not certain.
    """

    make: Callable[[EndStep | None], Any]
    count_steps: Callable[[], int] = one_step
