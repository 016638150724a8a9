"""Run a function on a worker, a stretch at a time: its caller waits while it runs, and in turn."""

# Guarantees:
#   - exactly one of {caller, function} runs at any moment;
#   - what the function raises is raised where it was resumed;
#   - after close() the function has been left, wherever it paused.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

from tracekit.interleave.duties import Channel
from tracekit.interleave.protocol import TRANSITIONS, Move, State, Unwind
from tracekit.interleave.worker import run_beside


@final
class Aside:
    """One run of a function, which calls `pause()` where its caller is to go on."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.state = State.READY
        self._error: BaseException | None = None
        self._is_closing = False

    # -- the caller's side ----------------------------------------------------------------------

    def start(self, function: Callable[[], None]) -> None:
        """Let `function` run until it pauses or ends; raises its error."""
        run_beside(self, partial(self._run, function))
        self._move(Move.START)
        self._resume()

    def resume(self) -> None:
        """Let the function run until it pauses again or ends; raises its error."""
        self._move(Move.ANSWER)
        self._resume()

    def close(self) -> None:
        """Leave the function, wherever it paused; what it raises is dropped."""
        self._is_closing = True
        if self.state is State.READY and self.channel is not None:
            self._move(Move.START)  # an interrupt came just before it began
        while self.state is State.WAITING or self.state is State.RUNNING:
            if self.state is State.WAITING:
                self._move(Move.ANSWER)
            assert self.channel is not None
            self.channel.resume_worker()
        self._error = None

    # -- the function's side --------------------------------------------------------------------

    def pause(self) -> None:
        """Let the caller go on until it resumes."""
        self._move(Move.ASK)
        assert self.channel is not None
        self.channel.suspend_worker()
        if self._is_closing:
            raise Unwind

    def end(self, error: BaseException | None) -> None:
        """As its last act."""
        self._error = None if isinstance(error, Unwind) else error
        self._move(Move.END)

    # -- inside ---------------------------------------------------------------------------------

    def _run(self, function: Callable[[], None]) -> None:
        if not self._is_closing:
            function()

    def _resume(self) -> None:
        assert self.channel is not None
        self.channel.resume_worker()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def _move(self, move: Move) -> None:
        self.state = TRANSITIONS[self.state, move]
