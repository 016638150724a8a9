"""Threads that run blocks, or the model of a block in place; pooled, as starting one is dear."""

# Guarantees:
#   - whoever waited for a worker puts it back into the pool, so a trace after a trace reuses its
#     thread, and nobody else gets it before it has handed back;
#   - an idle worker holds nothing of the job it ran;
#   - after a fork the pool starts empty, as the threads exist in the parent alone.

from __future__ import annotations

import ctypes
import os
import threading
from _thread import get_ident
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Protocol, final

from tracekit.capture import user_traceback
from tracekit.interleave.baton import Baton
from tracekit.interleave.duties import Channel
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import State, Unwind
from tracekit.interleave.standing import standing_here
from tracekit.interleave.torch_state import TorchState, grad_mode

_idle: list[Worker] = []  # the pool; list.append and list.pop are atomic
_local = threading.local()


exclusively = threading.Lock()  # for what several runs change on one module
this_thread = get_ident  # a number that no two threads have at the same time


class Side(Protocol):
    """Whose job a worker runs: a Mediator, or an Aside."""

    channel: Channel | None
    state: State

    def end(self, error: BaseException | None) -> None:
        """Worker's side, as its last act: the job has ended."""
        ...


def current_mediator() -> Mediator | None:
    """The mediator of the block that runs on this thread, if one does."""
    here: Mediator | None = getattr(_local, "here", None)
    return here or standing_here(get_ident(), getattr(_local, "mediator", None))


def run_beside(side: Side, body: Callable[[], None], grad: bool | None = None) -> None:
    """Attach a pooled worker to `side`, ready to run `body` under the caller's torch state.

    `grad` overrides the grad mode, for calls that set it themselves (generate).
    """
    worker = _idle.pop() if _idle else Worker()
    worker.prepare(side, body, TorchState(), grad)


def later_beside(
    side: Side, body: Callable[[], None], grad: bool | None = None
) -> Callable[[], None]:
    """What gives `side` a worker and resumes it, under the torch state that the caller has now."""
    state = TorchState()

    def begin() -> None:
        worker = _idle.pop() if _idle else Worker()
        worker.prepare(side, body, state, grad)
        worker.resume_worker()

    return begin


def run_here(mediator: Mediator, body: Callable[[], None], grad: bool | None = None) -> None:
    """Run a block that has all its answers, on this thread; its error is the mediator's then."""
    before, _local.here = getattr(_local, "here", None), mediator
    mediator.error = None
    try:
        with grad_mode(grad):
            body()
        if mediator.answers is not None:
            mediator.answers.check_taken()
    except Unwind:
        pass
    except BaseException as caught:  # noqa: BLE001 - every way out of the block ends here
        mediator.error = caught.with_traceback(user_traceback(caught))
    finally:
        _local.here = before


@final
class Worker:
    """One thread and the two-way hand-over to it; the Channel of one side at a time."""

    def __init__(self) -> None:
        self._baton = Baton()
        self._job: Callable[[], None] | None = None
        self._side: Side | None = None
        self._is_seen = False  # the last interrupt was raised in the block
        self._is_draining = False  # woken only to take an interrupt that came too late
        self._waits_for: Worker | None = None  # the worker of a trace inside this one's block
        self._thread = threading.Thread(target=self._live, name="tracekit-worker", daemon=True)
        self._thread.start()

    def prepare(
        self, side: Side, body: Callable[[], None], state: TorchState, grad: bool | None
    ) -> None:
        """Set what `resume_worker` will start."""

        def job() -> None:
            state.context.run(_run, side, body, state.adopted(grad))

        self._job = job
        self._side = side
        side.channel = self

    @property
    def ident(self) -> int:
        """The thread, as `this_thread` numbers it."""
        assert self._thread.ident is not None
        return self._thread.ident

    @property
    def has_job(self) -> bool:
        """Whether it was given a job and has not ended it."""
        return self._job is not None

    def take(self, job: Callable[[], None]) -> None:
        """Set what `resume_worker` will start, for a job without a mediator of its own."""
        self._job = job

    def release(self) -> None:
        """Back into the pool without having begun its job."""
        self._job = None
        _idle.append(self)

    # -- Channel --------------------------------------------------------------------------------

    def resume_worker(self) -> None:
        """Model's side: let the worker run until it suspends or ends.

        Raises KeyboardInterrupt if Ctrl-C came meanwhile and the block has not seen it.
        """
        outer: Worker | None = getattr(_local, "worker", None)
        if outer is not None:
            outer._waits_for = self
        is_lost = False
        try:
            self._baton.give_to_worker()
        except KeyboardInterrupt:
            is_lost = self._interrupt()
        finally:
            if outer is not None:
                outer._waits_for = None
            if self._job is None:
                _idle.append(self)
        if is_lost:
            raise KeyboardInterrupt

    def suspend_worker(self) -> None:
        """Worker's side: let the model run until it resumes this worker."""
        self._give_back()
        if self._wait_for_turn():
            raise KeyboardInterrupt

    # -- inside ---------------------------------------------------------------------------------

    def _interrupt(self) -> bool:
        """Ctrl-C came to the model's side: raise it in the block if that is what runs.

        True if the block did not see it: it had parked, or ended, in that very moment.
        """
        self._is_seen = False
        while self._baton.is_with_worker():
            innermost = self
            while innermost._waits_for is not None:
                innermost = innermost._waits_for
            _raise_in(innermost._thread, _BlockInterrupt)
            with suppress(KeyboardInterrupt):  # pressed again: raise it again
                self._baton.wait_for_worker()
        if self._is_seen:
            return False
        # It may be on its way to a thread that is parked, and as long as it is, Python 3.11 can
        # hang in any thread that is being traced: wake the worker for a moment, to take it.
        self._is_draining = True
        with suppress(KeyboardInterrupt):
            self._baton.give_to_worker()
        while self._baton.is_with_worker():
            with suppress(KeyboardInterrupt):
                self._baton.wait_for_worker()
        return True

    def _live(self) -> None:
        _local.worker = self
        while True:
            try:
                if self._wait_for_turn():
                    raise KeyboardInterrupt
                assert self._job is not None
                self._job()
            except KeyboardInterrupt:  # it came when the block had not begun, or had ended
                self._is_seen = False
            while self._job is not None:
                try:
                    self._end_job()
                except KeyboardInterrupt:
                    self._is_seen = False
            self._give_back()

    def _give_back(self) -> None:
        try:
            if self._baton.give_to_model():
                self._is_seen = False
        except KeyboardInterrupt:  # behind the last line of it
            self._is_seen = False

    def _wait_for_turn(self) -> bool:
        """Wait for the baton; whether an interrupt came with it."""
        while True:
            came = False
            try:
                self._baton.wait_for_model()
            except KeyboardInterrupt:
                came = True
            if not self._is_draining:
                return came
            self._is_draining = False
            self._give_back()

    def _end_job(self) -> None:
        if self._side is not None and self._side.state is State.RUNNING:
            self._side.end(KeyboardInterrupt())  # it came between the block and its end
        self._side = None
        self._job = None


@final
class ModelThread:
    """A pooled thread for the model of a block that stays on the caller's thread.

    It is the Channel of that block's mediator, with the roles of the two threads swapped.
    """

    def __init__(self) -> None:
        self._worker = _idle.pop() if _idle else Worker()
        self.has_begun = False
        self.error: BaseException | None = None  # what the run ended with

    @property
    def ident(self) -> int:
        """The thread, as `this_thread` numbers it."""
        return self._worker.ident

    @property
    def has_ended(self) -> bool:
        """Whether the run is over, and the thread back in the pool."""
        return not self._worker.has_job

    def prepare(
        self, run: Callable[[], BaseException | None], state: TorchState | None = None
    ) -> None:
        """Set what is to be run, under `state`, by default the caller's torch state of now."""
        adopted = state or TorchState()

        def job() -> None:
            self.error = adopted.context.run(_run_model, run, adopted.adopted())

        self._worker.take(job)

    def release(self) -> None:
        """Let the thread go; nothing has begun on it."""
        if self._worker not in _idle:
            self._worker.release()

    def suspend_worker(self) -> None:
        """The block's side: let the model run until it has what the block waits for, or ends."""
        self.has_begun = True
        self._worker.resume_worker()

    def resume_worker(self) -> None:
        """The model's side: let the block run until it waits for something, or ends."""
        self._worker.suspend_worker()


def _run_model(
    run: Callable[[], BaseException | None], state: AbstractContextManager[None]
) -> BaseException | None:
    try:
        with state:
            error = run()
    except BaseException as caught:  # noqa: BLE001 - it is raised again at the user's `with`
        error = caught
    shown = None
    try:
        if error is None:
            return None
        shown = KeyboardInterrupt() if isinstance(error, _BlockInterrupt) else error
        return shown.with_traceback(user_traceback(error))
    finally:
        del error, shown  # frames of the model refer to this one, and it to nothing


class _BlockInterrupt(KeyboardInterrupt):
    """Ctrl-C on its way into a block; notes that it was raised there."""

    def __init__(self) -> None:
        super().__init__()
        _local.worker._is_seen = True


def _run(side: Side, body: Callable[[], None], state: AbstractContextManager[None]) -> None:
    _local.mediator = side if isinstance(side, Mediator) else None
    error: BaseException | None = None
    try:
        with state:
            body()
    except BaseException as caught:  # noqa: BLE001 - every way out of the block ends here
        error = KeyboardInterrupt() if isinstance(caught, _BlockInterrupt) else caught
        error.__traceback__ = user_traceback(caught)
    finally:
        _local.mediator = None
        side.end(error)
        del error, side, body  # the frames of the block refer to this one, and it to nothing


def _raise_in(thread: threading.Thread, kind: type[BaseException]) -> None:
    """Raise `kind` in `thread` at its next line of Python."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(kind))


os.register_at_fork(after_in_child=_idle.clear)
