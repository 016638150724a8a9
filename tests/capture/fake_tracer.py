"""A tracer without a model: runs the captured body on a plain thread, and hands its names back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
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
    return caught.pop() if caught else None  # the body's frame leads back to work() and its cells


def load(text: str, path: Path, **names: Any) -> dict[str, Any]:
    """The names of a module made of `text` in the file `path`."""
    path.write_text(text, "utf-8")
    namespace: dict[str, Any] = {"__name__": path.stem, **names}
    exec(compile(text, str(path), "exec", dont_inherit=True), namespace)
    return namespace


class FakeTracer:
    """What a tracer of tracekit does with tracekit.capture, and nothing else."""

    def __init__(
        self,
        run: Callable[[Body], BaseException | None] = run_on_a_thread,
        helpers: Mapping[str, object] | None = None,
        entered: object = None,
    ) -> None:
        self.frame: FrameType | None = None
        self.block: Block | None = None
        self.skip: Skip | None = None
        self.thread = get_ident()
        self._run = run
        self._entered = entered
        self._helpers = {"save": save} if helpers is None else helpers

    def __enter__(self) -> Any:
        frame = caller_frame()
        entered = self if self._entered is None else self._entered
        self.block = capture(frame)
        if not self.block.is_empty:
            self.skip = skip_body(self.block, frame, entered=entered)
            self.frame = frame
        return entered

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
        assert error is not None, "the body ran in place"
        if not skip.is_own(error):
            return False
        assert block is not None
        assert frame is not None
        body = block.body(frame, self._helpers)
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
