"""Hand control between exactly two threads; whoever does not hold the baton waits."""

# Guarantees:
#   - a hand-over happens once, also when KeyboardInterrupt is raised in the middle of it;
#   - after an interrupt, the model's side can tell whether it holds the baton.
#
# An interrupt can be raised behind every call. So each side notes what it is about to do in a
# plain attribute, directly before the one call that does it: Python does not look for interrupts
# between the two.

from __future__ import annotations

from _thread import allocate_lock
from typing import Final, final

SIGNAL_CHECK: Final = 0.5  # seconds; a signal just before a wait begins would not end the wait


@final
class Baton:
    """Two locks, each held while its side has to wait; the model's side holds the baton first.

    Two bare locks are the cheapest hand-over there is: an Event costs twice as much, and a
    queue adds a deque to them.
    """

    __slots__ = ("_given", "_model_may_run", "_returned", "_returning", "_worker_may_run")

    def __init__(self) -> None:
        self._model_may_run = allocate_lock()
        self._worker_may_run = allocate_lock()
        self._model_may_run.acquire()
        self._worker_may_run.acquire()
        self._given = 0  # how often the baton was given to the worker
        self._returning = 0  # which of these times it is giving back, or has given back
        self._returned = 0  # which of these times it has given back

    # -- the model's side -----------------------------------------------------------------------

    def give_to_worker(self) -> None:
        """Let the worker run, and wait until it gives back.

        On KeyboardInterrupt the worker may still hold the baton: then `wait_for_worker` again.
        """
        self._given += 1
        self._worker_may_run.release()
        self.wait_for_worker()

    def wait_for_worker(self) -> None:
        """Wait until the worker gives back."""
        while not self._model_may_run.acquire(True, SIGNAL_CHECK):
            pass

    def is_with_worker(self) -> bool:
        """After an interrupt: whether the worker still runs."""
        if self._returning != self._given:
            return True
        while self._returned != self._given:
            pass  # it is between two lines
        self._model_may_run.acquire(False)  # if the interrupt came before the lock was taken
        return False

    # -- the worker's side ----------------------------------------------------------------------

    def give_to_model(self) -> bool:
        """Let the model run; whether an interrupt came on the way. `wait_for_model` comes next."""
        was_interrupted = False
        given = self._given  # read once: behind the release the model may give again
        while self._returned != given:
            try:
                if self._returning != given:
                    self._returning = given
                    self._model_may_run.release()
                self._returned = given
            except KeyboardInterrupt:
                was_interrupted = True
        return was_interrupted

    def wait_for_model(self) -> None:
        """Wait until the model gives the baton."""
        self._worker_may_run.acquire()
