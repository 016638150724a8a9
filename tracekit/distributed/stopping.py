"""Stop what runs on a thread from another one: at a time limit, or when the client says so."""

# Guarantees:
#   - the interrupt is raised in the work, or not at all: none is left pending when it has ended;
#   - code that is blocked in C goes on until it returns to Python: whoever can, kills its process.

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import TracebackType
from typing import final

from tracekit.interleave.worker import this_thread


@final
class Stoppable:
    """`with Stoppable(...) as running:` is work on this thread that `running.stop` interrupts.

    It raises KeyboardInterrupt there, which a tracekit run takes into its block.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._thread = this_thread()
        self._lock = threading.Lock()
        self._is_running = False
        self.why: str | None = None  # it was stopped
        self._timer = None if timeout is None else threading.Timer(timeout, self.stop, ["time"])

    def stop(self, why: str) -> None:
        """Interrupt the work if it still runs; from any thread."""
        with self._lock:
            if self._is_running:
                self.why = self.why or why
                _raise_in(self._thread, KeyboardInterrupt)

    def __enter__(self) -> Stoppable:
        self._is_running = True
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _surely(self._end)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._is_running = False
        if self.why is not None:
            _surely(_take_what_is_pending)


def _surely(act: Callable[[], None]) -> None:
    """Do it, also if an interrupt comes in the middle of it."""
    while True:
        try:
            act()
        except KeyboardInterrupt:
            continue
        return


def _take_what_is_pending() -> None:
    """Run some lines of Python, so that an interrupt which is on its way comes now.

    Taking it back by `PyThreadState_SetAsyncExc(thread, NULL)` makes Python 3.11 hang.
    """
    for _ in range(100):
        pass


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raise `kind` in a thread at its next line of Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
