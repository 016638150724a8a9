"""A block that can't be lifted out: it stays on the user's thread, the model runs on a worker's."""

# Guarantees:
#   - the model begins when the block first asks for something, or at the end of the block;
#   - however the block is left (its end, return, an error, Ctrl-C, a generator that is closed or
#     forgotten), the model has ended or was unwound, and every hook is off.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Final, final

import torch

from tracekit.interleave.protocol import Unwind
from tracekit.interleave.standing import Standing
from tracekit.interleave.worker import ModelThread, this_thread
from tracekit.tracing.attribute import with_items_opened_by, with_save
from tracekit.tracing.execution import Execution
from tracekit.tracing.gradients import backward_item
from tracekit.tracing.save import name_cure
from tracekit.tracing.ways import Way

_MAY_SUSPEND: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@final
class InPlace(Way):
    """A block that runs where it stands, with the model on another thread beside it."""

    def __init__(
        self, frame: FrameType, start: Callable[[int], Execution], grad: bool | None, why: str
    ) -> None:
        self.told = f"The block ran in place, beside the model on another thread: {why}"
        self._model = ModelThread()
        self._on_exit = ExitStack()
        try:
            self.execution = start(self._model.ident)
            self._mediator = self.execution.open_in_place(self._model)
            self._model.prepare(partial(self.execution.run, []))
            self._standing = Standing(self._mediator, frame, this_thread())
            self._grad_before = _set_grad(frame, grad)
            self._on_exit.enter_context(with_items_opened_by(backward_item))
            self._on_exit.enter_context(with_save())
            if not frame.f_code.co_flags & _MAY_SUSPEND:  # for others, while it is suspended
                self._on_exit.enter_context(self.execution.mode)
        except BaseException:
            self._model.release()
            raise

    def is_own(self, error: BaseException | None) -> bool:
        return isinstance(error, Unwind) and error.owner is self._mediator

    def abandon(self, error: BaseException) -> None:
        failure = self._end(is_whole=False)
        name_cure(error)
        link = error
        while link.__context__ is not None:
            if self.is_own(link.__context__):  # it failed while the run's own error unwound it
                link.__context__ = failure
                break
            link = link.__context__

    def finish(self) -> BaseException | None:
        return self._end(is_whole=True)

    def _end(self, is_whole: bool) -> BaseException | None:
        was_interrupted = False
        for act in (self._leave_block, partial(self._leave_run, is_whole)):
            is_done = False
            while not is_done:
                try:
                    act()
                    is_done = True
                except KeyboardInterrupt:  # first things first
                    was_interrupted = True
        if was_interrupted:
            raise KeyboardInterrupt
        error, self._model.error = self._model.error, None
        return error

    def _leave_block(self) -> None:
        self._standing.close()
        self._on_exit.close()
        if self._grad_before:
            torch.set_grad_enabled(True)

    def _leave_run(self, is_whole: bool) -> None:
        """Let the model come to its end; when Python ends, no other thread runs any more."""
        self._mediator.leave(is_whole)
        if not is_whole and not self._model.has_begun:
            self._model.release()
        while not self._model.has_ended and not sys.is_finalizing():
            self._model.suspend_worker()
        assert self.execution is not None
        self.execution.abandon()  # if it never began


def _set_grad(frame: FrameType, grad: bool | None) -> bool:
    """Switch gradients off for a block whose call does so itself; whether they were on.

    Not in a generator or coroutine: while it is suspended, they would stay off for others.
    """
    if grad is not False or frame.f_code.co_flags & _MAY_SUSPEND or not torch.is_grad_enabled():
        return False
    torch.set_grad_enabled(False)
    return True
