"""A tracer without a model: runs the captured body on a plain thread, and hands its names back."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread, get_ident
from types import FrameType, TracebackType
from typing import Any

from tracekit.capture import (
    Block,
    Body,
    Skip,
    caller_frame,
    capture,
    frames,
    show_own_lines,
    skip_body,
)

frames._is_own[__file__] = True  # it plays the part of tracekit's own tracer


def save(value: Any) -> Any:
    return ("saved", value)


def run_on_a_thread(body: Body) -> BaseException | None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            body()
        except BaseException as error:
            caught.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    return caught[0] if caught else None


class FakeTracer:
    """What a tracer of tracekit does with tracekit.capture, and nothing else."""

    def __init__(self, run: Callable[[Body], BaseException | None] = run_on_a_thread) -> None:
        self.frame: FrameType | None = None
        self.block: Block | None = None
        self.skip: Skip | None = None
        self.thread = get_ident()
        self._run = run

    def __enter__(self) -> FakeTracer:
        self.frame = caller_frame()
        self.block = capture(self.frame)
        if not self.block.is_empty:
            self.skip = skip_body(self.block, self.frame, entered=self)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> bool:
        skip, frame, block = self.skip, self.frame, self.block
        self.skip = self.frame = None
        if skip is None:
            return False
        skip.restore()
        if not skip.is_own(error):
            return False
        assert block is not None and frame is not None
        body = block.body(frame, {"save": save})
        del frame, error
        try:
            raised = self._run(body)
        finally:
            body.hand_back()
        if raised is None:
            return True
        context = raised.__context__
        try:
            raise raised
        except BaseException as caught:
            show_own_lines(caught, context)
            raise
        finally:
            del raised, context
