"""Keep the body of a `with` from running in place, by raising where it would begin."""

# Guarantees:
#   - the exception is raised before the first instruction of the body, in the frame that asked;
#   - after restore(), trace functions and monitoring tools are those of before;
#   - a Skip refers to no frame and no exception after restore().

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from types import CodeType, FrameType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, final

from tracekit.capture.variables import bind_name
from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracekit.capture.block import Block
    from tracekit.capture.bytecode import BodyStart

_NOT_GIVEN: Final = object()
_monitoring: Final[Any] = getattr(sys, "monitoring", None)
# The ids with a customary owner last: optimizer, profiler, coverage, debugger.
_TOOLS: Final = (3, 4, 5, 2, 1, 0) if sys.version_info >= (3, 12) else ()
_caller: Final = sys._getframe  # pyright: ignore[reportPrivateUsage]


@final
class BodySkipped(BaseException):
    """Raised where the body would begin; the `with` that asked for it swallows it."""

    def __init__(self, token: object) -> None:
        super().__init__("the body of this block runs elsewhere")
        self.token = token


class Skip(ABC):
    """One body that does not run in place."""

    def __init__(self, start: BodyStart, frame: FrameType) -> None:
        self._token = object()  # not the exception itself: its traceback leads back to the frame
        self._first, self._last = start.first, start.last
        self._frame: FrameType | None = frame

    def is_own(self, error: BaseException | None) -> bool:
        """Is this the exception that skipped the body?"""
        return isinstance(error, BodySkipped) and error.token is self._token

    def restore(self) -> None:
        """Put back trace functions or monitoring exactly as before."""
        frame, self._frame = self._frame, None
        if frame is not None:
            self._uninstall(frame)

    @abstractmethod
    def _uninstall(self, frame: FrameType) -> None: ...


def skip_body(block: Block, frame: FrameType, entered: object = _NOT_GIVEN) -> Skip:
    """Arrange that the body does not run in place; call it in `__enter__`.

    `entered` is what `__enter__` will return. It is needed where a body begins with `try:` and the
    `with` has an `as`: the skip must then fire before Python binds that name, so it is bound here.
    """
    start = block.start
    if start.is_before_target:
        _bind_target(block, frame, entered)
    tool = _take_tool()
    if tool is not None:
        return MonitoringSkip(start, frame, tool)
    return TracingSkip(start, frame)


def _bind_target(block: Block, frame: FrameType, entered: object) -> None:
    if entered is _NOT_GIVEN or block.target is None:
        raise CaptureError(
            f"{block.filename}:{block.first_line}: the block begins with `try:` and `as` names "
            "no plain variable; put another statement before the `try:`"
        )
    bind_name(frame, block.target, entered)


@final
class TracingSkip(Skip):
    """Skips through the opcode events of `sys.settrace` (up to 3.11, and if no tool is free)."""

    def __init__(self, start: BodyStart, frame: FrameType) -> None:
        super().__init__(start, frame)
        self._tracer: Any = sys.gettrace()
        self._before = (frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines)
        frame.f_trace = self._on_event
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        sys.settrace(_ignore)

    def _on_event(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "opcode" and self._first <= frame.f_lasti <= self._last:
            raise BodySkipped(self._token)
        return self._on_event

    def _uninstall(self, frame: FrameType) -> None:
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self._before
        tracer, self._tracer = self._tracer, None
        sys.settrace(tracer)
        if tracer is not None and not isinstance(tracer, (FunctionType, MethodType)):
            # A tracer in C (coverage) sees the returns of all frames, so tell it of their calls.
            for missed in reversed(_frames_up_to(frame)):
                tracer(missed, "call", None)


def _frames_up_to(end: FrameType) -> list[FrameType]:
    """The frames from the caller's out to the one that `end` called."""
    frames: list[FrameType] = []
    frame: FrameType | None = _caller(1)
    while frame is not None and frame is not end:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _ignore(_frame: FrameType, _event: str, _arg: object) -> None:
    return None


@final
class MonitoringSkip(Skip):
    """Skips through the instruction events of `sys.monitoring` (3.12 and later).

    Events come from every thread that runs this code; a frame runs in one, so the frame tells.
    """

    def __init__(self, start: BodyStart, frame: FrameType, tool: int) -> None:
        super().__init__(start, frame)
        self._tool = tool
        _monitoring.register_callback(tool, _monitoring.events.INSTRUCTION, self._on_instruction)
        _monitoring.set_local_events(tool, frame.f_code, _monitoring.events.INSTRUCTION)

    def _on_instruction(self, _: CodeType, offset: int) -> None:
        if self._first <= offset <= self._last and _caller(1) is self._frame:
            raise BodySkipped(self._token)

    def _uninstall(self, frame: FrameType) -> None:
        _monitoring.set_local_events(self._tool, frame.f_code, 0)
        _monitoring.register_callback(self._tool, _monitoring.events.INSTRUCTION, None)
        _monitoring.free_tool_id(self._tool)


def _take_tool() -> int | None:
    """A tool id for the few microseconds until the body would begin; None if all are taken."""
    for tool in _TOOLS:
        try:
            _monitoring.use_tool_id(tool, "tracekit")
        except ValueError:
            continue
        return tool
    return None
