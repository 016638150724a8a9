"""The ways in which the block of a trace may run: before the model, beside it, or behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, final

from tracekit.capture import Block, Skip, skip_body
from tracekit.core.tree import Tree
from tracekit.errors import CaptureError
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.foresight import ask_group, forecast, foreseen
from tracekit.tracing.gradients import backward_item
from tracekit.tracing.save import save_method

HELPERS: dict[str, Any] = {"save": save_method, "backward": backward_item}


class Way(ABC):
    """One block, from the head of its `with` to its end; used once."""

    execution: Execution | None = None  # while the block may ask for something
    told: str  # how the block runs, for people

    def is_own(self, error: BaseException | None) -> bool:
        """Whether `error` was raised by this way, to leave the place where the block stands."""
        return False

    @abstractmethod
    def abandon(self, error: BaseException) -> None:
        """Let go of everything: an error of the user's leaves the block where it stands."""

    @abstractmethod
    def finish(self) -> BaseException | None:
        """Run what is left to run; the error that ended it, if one did."""


@final
class Quiet(Way):
    """A block that asks the model for nothing: it runs where it stands, before the model."""

    told = "The block ran in place, before the model: it only makes caches."

    def __init__(self, execution: Execution) -> None:
        self.execution = execution

    def abandon(self, error: BaseException) -> None:
        assert self.execution is not None
        self.execution.abandon()

    def finish(self) -> BaseException | None:
        assert self.execution is not None
        return self.execution.run([])


@final
class Lifted(Way):
    """A block that is kept from running where it stands: a worker runs it beside the model.

    One that only stores what it reads runs behind the model, on the user's thread, with answers
    that were asked ahead of it.
    """

    told = (
        "The block was lifted out of its place, and ran on a worker beside the model, or behind "
        "the model where it only stores what it reads (tracer.graph marks those reads: deferred)."
    )

    def __init__(
        self,
        block: Block,
        frame: FrameType,
        entered: object,
        start: Callable[[], Execution],
        tree: Tree,
    ) -> None:
        self._skip: Skip = skip_body(block, frame, entered=entered)
        self._block = block
        self._frame: FrameType | None = frame
        self._entered = entered
        self._start = start
        self._tree = tree
        self._is_skipped = False

    def is_own(self, error: BaseException | None) -> bool:
        self._skip.restore()
        self._is_skipped = self._is_skipped or self._skip.is_own(error)
        return self._skip.is_own(error)

    def abandon(self, error: BaseException) -> None:
        self._skip.restore()
        self._frame = None

    def finish(self) -> BaseException | None:
        self._skip.restore()
        frame, self._frame = self._frame, None
        if not self._is_skipped:
            raise CaptureError(
                "the block ran in place, where its values do not exist: something (a debugger, a "
                "coverage tool) took the trace function away while tracekit kept it from running."
            )
        assert frame is not None
        block, entered, tree = self._block, self._entered, self._tree
        body = block.body(frame, HELPERS | {"ahead": partial(ask_group, block, entered, tree)})
        self.execution = self._start()
        try:
            known = foreseen(block, frame, entered, tree)
            asked = known[0] if known is not None else None
            ahead = partial(forecast, block, frame, entered, tree)
            own = Intervention(body, forecast=ahead, asked=asked, file=block.filename)
            return self.execution.run([own])
        finally:
            body.hand_back()


def abandon(way: Way, error: BaseException) -> None:
    """Let go of a way, also if Ctrl-C comes meanwhile."""
    try:
        way.abandon(error)
    except KeyboardInterrupt:  # perhaps before its first line
        way.abandon(error)
        raise


def without_own(
    error: BaseException, handled: BaseException | None, way: Way
) -> BaseException | None:
    """The context of `error`, with what the user is handling in the place of the way's own."""
    link = error
    while link.__context__ is not None and link.__context__ is not handled:
        if way.is_own(link.__context__):
            break
        link = link.__context__
    link.__context__ = handled if link is not handled else None
    return error.__context__
