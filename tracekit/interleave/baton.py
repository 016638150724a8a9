"""Hand control between exactly two threads; whoever does not hold the baton waits."""

from __future__ import annotations

from _thread import allocate_lock
from typing import final


@final
class Baton:
    """Two locks, each held while its side has to wait.

    Two bare locks are the cheapest hand-over there is: an Event costs twice as much, and a
    queue adds a deque to them. The model's side holds the baton first.
    """

    __slots__ = ("_model_may_run", "_worker_may_run")

    def __init__(self) -> None:
        self._model_may_run = allocate_lock()
        self._worker_may_run = allocate_lock()
        self._model_may_run.acquire()
        self._worker_may_run.acquire()

    def give_to_worker(self) -> None:
        """Let the worker run. The model's side must call `wait_for_worker` next."""
        self._worker_may_run.release()

    def wait_for_worker(self) -> None:
        """Block the model's thread until the worker hands back.

        KeyboardInterrupt can arrive here, as the lock of a main thread is interruptible; the
        worker runs on then, and the caller has to wait again.
        """
        self._model_may_run.acquire()

    def give_to_model(self) -> None:
        """Let the model's thread go on; the worker must end, or call `wait_for_model`, next."""
        self._model_may_run.release()

    def wait_for_model(self) -> None:
        """Block the worker until it is given the baton."""
        self._worker_may_run.acquire()
