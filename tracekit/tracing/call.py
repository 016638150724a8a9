"""The call that a trace runs, how many steps it will have, and who follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

from tracekit.tracing.timeline import Timeline


class Follower(Protocol):
    """What wants to know how a call goes (an Execution)."""

    @property
    def timeline(self) -> Timeline:
        """Where the call writes down the tokens of its forwards."""
        ...

    def end_step(self) -> None:
        """A decoding iteration has ended."""
        ...


def one_step() -> int:
    """How many steps a forward pass has."""
    return 1


@final
@dataclass(frozen=True)
class TracedCall:
    """`make` makes the call, given who follows it.

    `count_steps` tells before the call how many it will have; StepError where that is not certain.
    """

    make: Callable[[Follower | None], Any]
    count_steps: Callable[[], int] = one_step


def _run_again(_: Follower | None) -> Any:
    raise AssertionError("a call is made once")


OVER: Final = TracedCall(_run_again)  # in the place of one that was made
