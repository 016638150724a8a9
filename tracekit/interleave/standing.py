"""Blocks that stand in place: which of those open on a thread a request is for."""

# Guarantees:
#   - a request never goes to another run than that of the block it stands in: a block is asked for
#     only while its `with` can be what runs;
#   - nothing here keeps the user's frame alive.

from __future__ import annotations

from contextvars import ContextVar
from types import FrameType
from typing import Final, final

from tracekit.capture import is_running, suspendable
from tracekit.errors import OutsideTraceError
from tracekit.interleave.mediator import Mediator

# A context variable, so that each asyncio task has its own.
_standing: Final[ContextVar[tuple[Standing, ...]]] = ContextVar("tracekit_standing", default=())


@final
class Standing:
    """One block, from its `with` to its end, on the thread that opened it."""

    __slots__ = ("_mediator", "_suspendable", "_thread")

    def __init__(self, mediator: Mediator, frame: FrameType, thread: int) -> None:
        self._mediator: Mediator | None = mediator
        self._thread = thread
        self._suspendable = suspendable(frame)
        _standing.set((*_standing.get(), self))

    def close(self) -> None:
        """The block has ended (perhaps in another context than it began, as generators may)."""
        self._mediator = None
        _standing.set(tuple(other for other in _standing.get() if other._mediator is not None))

    def mediator_on(self, thread: int) -> Mediator | None:
        """Its mediator, while it is open, and if it was opened on `thread`."""
        return self._mediator if self._thread == thread else None

    @property
    def may_run(self) -> bool:
        """False while the generator or coroutine around it is suspended."""
        return self._suspendable is None or is_running(self._suspendable)


def standing_here(thread: int, beneath: Mediator | None) -> Mediator | None:
    """Whom a request is for; `beneath` is the mediator of the body that this whole thread runs.

    Innermost first, and a suspended block last: only if no other is open is it asked from outside
    of its generator (by whoever drives that as a context manager of their own).
    """
    opened = [block for block in _standing.get() if block.mediator_on(thread) is not None]
    if not opened:
        return beneath
    if len(opened) == 1 and beneath is None:
        return opened[0].mediator_on(thread)
    for block in reversed(opened):
        if block.may_run:
            return block.mediator_on(thread)
    if beneath is not None:
        return beneath
    raise OutsideTraceError(
        f"this was asked for while {len(opened)} blocks are open and suspended, each in its own "
        f"generator or coroutine, so it could be meant for any; ask for it in the block itself."
    )
