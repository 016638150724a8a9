"""Answers to what was asked ahead of a block, for the block to take in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from tracekit.core.site import Visit
from tracekit.errors import CaptureError
from tracekit.interleave.protocol import NextStep, Reply, Unwind


@dataclass(frozen=True)
class Made:
    """What a block makes without the model, as a cache is made."""

    method: str
    value: object = None


# What a block may ask ahead: a Visit to be read, a step, something to be made.
# Strings are for what is made, and for people.
Asked: TypeAlias = Visit | NextStep | str


@final
class Answers:
    """A queue; `take` is the block's side of it."""

    def __init__(self, step: int, is_all: bool) -> None:
        self.step = step  # what the block's first request is about
        self.is_all = is_all  # the block asks for nothing else
        # Whether the block sees what its forecast saw; else it may do another thing than asked.
        self.is_as_it_was: Callable[[], bool] | None = None
        self._is_stale = False
        self._waiting: deque[tuple[Asked, Reply]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_cut_short(self) -> bool:
        """Whether the run ended before everything was answered."""
        return bool(self._waiting) and isinstance(self._waiting[-1][1].error, Unwind)

    def put(self, asked: Asked, reply: Reply) -> None:
        self._waiting.append((asked, reply))

    def look_again(self) -> None:
        """To be called just before the block goes on with the answers, once."""
        if self.is_as_it_was is not None:
            self._is_stale = not self.is_as_it_was()
            self.is_as_it_was = None

    def take(self, asked: Asked) -> object:
        """The answer to `asked`; raises what was answered with an error."""
        if self._is_stale:
            self._refuse()
        if not self._waiting:
            raise _other(asked, None)
        foreseen, reply = self._waiting.popleft()
        if isinstance(reply.error, Unwind):
            self._waiting.clear()
            raise reply.error
        if foreseen != asked:
            raise _other(asked, foreseen)
        if reply.error is not None:
            raise reply.error
        return reply.value

    def check_taken(self) -> None:
        """The block has ended: CaptureError if it did not ask for all that was asked for it."""
        if self._is_stale:
            self._refuse()
        if self._waiting and not self.is_cut_short:
            raise _other("nothing more", self._waiting[0][0])

    def _refuse(self) -> None:
        self._is_stale = False
        last = self._waiting[-1][1].error if self._waiting else None
        self._waiting.clear()
        if isinstance(last, Unwind):  # the run has failed, which is what the user is to see
            raise last
        raise CaptureError(f"the block uses {_CHANGED}")


def _other(asked: Asked, foreseen: Asked | None) -> CaptureError:
    return CaptureError(
        f"the block asked for {asked}, where its source said {foreseen or 'nothing more'}: it uses "
        f"{_CHANGED}"
    )


_CHANGED = (
    "something that was changed while the model ran, and runs itself behind the model. To run it "
    "step by step, set tracekit.settings.defer_reads = False."
)
