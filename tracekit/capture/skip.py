"""Keep the body of a `with` from running in place, by raising where it would begin, and leave no trace."""

# Guarantees:
#   - the exception is raised before the first instruction of the body, in the frame and thread that asked;
#   - after restore(), trace functions and monitoring tools are those of before; it may be called twice;
#   - a Skip refers to no frame and no exception after restore().

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from threading import Lock, get_ident
from types import CodeType, FrameType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final, final

from tracekit.capture.variables import bind_name
from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tracekit.capture.block import Block

_NOT_GIVEN: Final = object()


@final
class BodySkipped(BaseException):
    """Raised where the body would begin; the `with` that asked for it swallows it."""

    def __init__(self, token: object) -> None:
        super().__init__("the body of this block runs elsewhere")
        self.token = token


class Skip(ABC):
    """One body that does not run in place."""

    def __init__(self, offset: int, frame: FrameType) -> None:
        self._token = object()  # not the exception itself: its traceback leads back to the frame
        self._offset = offset
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

    `entered` is what `__enter__` will return. It is needed where a body begins with `try:` and the `with` has an
    `as`: there the skip must fire before Python binds that name, so the name is bound here.
    """
    start = block.start
    if start.is_before_target:
        if entered is _NOT_GIVEN or block.target is None:
            raise CaptureError(
                f"the block at {block.filename}:{block.first_line} begins with `try:` and its `as` names no plain variable; "
                "put another statement before the `try:`"
            )
        bind_name(frame, block.target, entered)
    if sys.version_info >= (3, 12):
        return MonitoringSkip(start.offset, frame)
    return TracingSkip(start.offset, frame)


@final
class TracingSkip(Skip):
    """Skips through the opcode events of `sys.settrace` (up to 3.11)."""

    def __init__(self, offset: int, frame: FrameType) -> None:
        super().__init__(offset, frame)
        self._tracer: Any = sys.gettrace()
        self._before = (frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines)
        frame.f_trace = self._on_event
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        sys.settrace(_ignore)

    def _on_event(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "opcode" and frame.f_lasti == self._offset:
            raise BodySkipped(self._token)
        return self._on_event

    def _uninstall(self, frame: FrameType) -> None:
        frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self._before
        tracer, self._tracer = self._tracer, None
        sys.settrace(tracer)
        if tracer is not None and not isinstance(tracer, (FunctionType, MethodType)):
            _call_event()  # a tracer in C (coverage) takes its place again at the next call event only


def _ignore(_frame: FrameType, _event: str, _arg: object) -> None:
    return None


def _call_event() -> None:
    return None


@final
class MonitoringSkip(Skip):
    """Skips through the instruction events of `sys.monitoring` (3.12 and later)."""

    def __init__(self, offset: int, frame: FrameType) -> None:
        super().__init__(offset, frame)
        self._thread = get_ident()
        _monitor.add(self._thread, self, frame.f_code)

    def is_at(self, offset: int, frame: FrameType) -> bool:
        return offset == self._offset and frame is self._frame

    def fire(self) -> None:
        raise BodySkipped(self._token)

    def _uninstall(self, frame: FrameType) -> None:
        _monitor.remove(self._thread, self, frame.f_code)


@final
class _Monitor:
    """The one tool of all skips that wait in this process; it holds a tool id only while one does."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._tool: int | None = None
        self._waiting: dict[int, list[MonitoringSkip]] = {}  # by thread
        self._counts: dict[int, int] = {}  # skips waiting, by code object (which their frames keep alive)

    def add(self, thread: int, skip: MonitoringSkip, code: CodeType) -> None:
        with self._lock:
            if self._tool is None:
                self._tool = self._take_tool()
            self._waiting.setdefault(thread, []).append(skip)
            count = self._counts[id(code)] = self._counts.get(id(code), 0) + 1
            if count == 1:
                sys.monitoring.set_local_events(self._tool, code, sys.monitoring.events.INSTRUCTION)

    def remove(self, thread: int, skip: MonitoringSkip, code: CodeType) -> None:
        with self._lock:
            self._waiting[thread].remove(skip)
            if not self._waiting[thread]:
                del self._waiting[thread]
            self._counts[id(code)] -= 1
            if not self._counts[id(code)]:
                del self._counts[id(code)]
                assert self._tool is not None
                sys.monitoring.set_local_events(self._tool, code, 0)
            if not self._waiting:
                self._give_tool_back()

    def _on_instruction(self, _: CodeType, offset: int) -> None:
        waiting = self._waiting.get(get_ident())
        if waiting and waiting[-1].is_at(offset, sys._getframe(1)):
            waiting[-1].fire()

    def _take_tool(self) -> int:
        for tool in (3, 4, 5, 2, 0, 1):  # 0, 1, 2 and 5 are customary for debuggers, coverage, profilers, optimisers
            try:
                sys.monitoring.use_tool_id(tool, "tracekit")
            except ValueError:
                continue
            sys.monitoring.register_callback(tool, sys.monitoring.events.INSTRUCTION, self._on_instruction)
            return tool
        raise CaptureError("all six tool ids of sys.monitoring are taken; free one (a debugger, coverage, a profiler)")

    def _give_tool_back(self) -> None:
        assert self._tool is not None
        sys.monitoring.register_callback(self._tool, sys.monitoring.events.INSTRUCTION, None)
        sys.monitoring.free_tool_id(self._tool)
        self._tool = None


_monitor: Final = _Monitor()
