"""Answers to what was asked ahead of a block, for the block to take in the same order."""

from __future__ import annotations

from collections import deque
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
        self._waiting: deque[tuple[Asked, Reply]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_cut_short(self) -> bool:
        """Whether the run ended before everything was answered."""
        return bool(self._waiting) and isinstance(self._waiting[-1][1].error, Unwind)

    def put(self, asked: Asked, reply: Reply) -> None:
        self._waiting.append((asked, reply))

    def take(self, asked: Asked) -> object:
        """The answer to `asked`; raises what was answered with an error."""
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
        if self._waiting and not self.is_cut_short:
            raise _other("nothing more", self._waiting[0][0])


def _other(asked: Asked, foreseen: Asked | None) -> CaptureError:
    return CaptureError(
        f"the block asked for {asked}, where its source said {foreseen or 'nothing more'}: "
        f"something that it uses was changed while the model ran. To run it step by step, set "
        f"tracekit.settings.defer_reads = False."
    )
