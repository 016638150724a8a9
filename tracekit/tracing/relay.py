"""Run a function on a thread of its own that stands still whenever it has handed something over."""

# Guarantees:
#   - exactly one of {caller's thread, the run's thread} runs at any moment;
#   - the run has the torch state of the place where the Relay was made;
#   - after close(), which also whatever leaves `advance` calls, the run has ended or was unwound,
#     and its thread is back in the pool;
#   - the run's thread refers to the Relay alone: whoever iterates can be dropped, and closes it.

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, final

from tracekit.errors import StreamError
from tracekit.interleave.protocol import Unwind
from tracekit.interleave.torch_state import TorchState
from tracekit.interleave.worker import ModelThread

# What runs, given the Relay, to hand items over to.
Run: TypeAlias = "Callable[[Relay], None]"


@final
class Relay:
    """One run, an item at a time. Methods say on which side they are called."""

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run
        self._state: TorchState | None = TorchState()
        self._process = os.getpid()
        self._thread: ModelThread | None = None
        self._items: list[Any] = []  # one, or none
        self._is_busy = False  # the run has the baton
        self._is_closing = False
        self._has_left = False  # the last line of the run
        self.is_over = False
        self.leave: Callable[[], None] | None = None  # unwinds the run, on its side

    # -- the caller's side ----------------------------------------------------------------------

    @property
    def is_standing(self) -> bool:
        """Whether the run has begun, and waits to be asked for more."""
        return self._thread is not None and not self._is_busy and not self.is_over

    @property
    def was_left(self) -> bool:
        """Whether it was closed before its end."""
        return self._is_closing

    def advance(self) -> list[Any]:
        """The next item, in a list, or an empty list if the run is over; raises its error."""
        if self.is_over:
            return []
        self._check_turn()
        try:
            self._begin()
            self._let_run()
            items, self._items = self._items, []
            if self.is_over:
                self._raise_error()
            return items
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the run end where it stands; raises what it ended with, other than that."""
        if self.is_over:
            self._drop_error()  # that of a run that ended just when Ctrl-C came
            return
        if os.getpid() != self._process:  # its thread is in the parent alone
            return
        self._check_turn()
        self._is_closing = True
        if self._thread is None:
            self._end()
            return
        was_interrupted = False
        while not self.is_over and not sys.is_finalizing():
            try:
                self._let_run()
            except KeyboardInterrupt:  # first things first
                was_interrupted = True
        if was_interrupted:
            self._drop_error()
            raise KeyboardInterrupt
        self._raise_error()

    def _check_turn(self) -> None:
        if self._is_busy:
            raise StreamError(
                "the stream is at work on its next item: it can't be asked for one, or closed, by "
                "what runs beside its model, or by another thread."
            )
        if os.getpid() != self._process:
            raise StreamError(
                "a stream goes on only in the process that began it: make one in this process."
            )

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = ModelThread()
            run, self._run = self._run, None
            assert run is not None
            self._thread.prepare(partial(self._run_all, run), self._state)
            self._state = None

    def _let_run(self) -> None:
        thread = self._thread
        assert thread is not None
        self._is_busy = True
        try:
            thread.suspend_worker()
        finally:
            self._is_busy = False
            if self._has_left or thread.has_ended:
                self._end()

    def _end(self) -> None:
        self.is_over = True
        self._run = self._state = None
        self._items.clear()

    def _raise_error(self) -> None:
        if self._thread is None:
            return
        error, self._thread.error = self._thread.error, None
        if error is not None and not isinstance(error, Unwind):
            try:
                raise error
            finally:
                del error  # its frames refer to this one

    def _drop_error(self) -> None:
        if self._thread is not None:
            self._thread.error = None

    # -- the run's side -------------------------------------------------------------------------

    def hand_over(self, item: Any) -> None:
        """Give `item` to the caller; blocks until the next one is wanted, and raises if none is."""
        assert self._thread is not None
        if not self._is_closing:
            self._items.append(item)
            self._thread.resume_worker()
        if self._is_closing:
            if self.leave is not None:
                self.leave()
            raise Unwind

    def _run_all(self, run: Run) -> BaseException | None:
        try:
            if not self._is_closing:
                run(self)
        finally:
            self.leave = None
            self._has_left = True
        return None
