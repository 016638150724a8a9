"""Skipping a body leaves trace functions, debuggers, coverage and monitoring as they were."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.capture.fake_tracer import FakeTracer, load
from tracekit.capture import caller_frame, is_with_item, skip
from tracekit.capture.bytecode import BodyStart
from tracekit.capture.skip import BodySkipped

needs_settrace = pytest.mark.skipif(
    sys.gettrace() is not None, reason="something else is tracing this run"
)


def test_nothing_is_left_after_a_block() -> None:
    before = sys.gettrace()
    with FakeTracer():
        x = 1
    frame = sys._getframe()
    assert x == 1
    assert sys.gettrace() is before
    assert (frame.f_trace_opcodes, frame.f_trace_lines) == (False, True)
    if sys.version_info >= (3, 12):
        assert "tracekit" not in [sys.monitoring.get_tool(tool) for tool in range(6)]


def test_nothing_is_left_after_an_error_in_the_block() -> None:
    before = sys.gettrace()
    with pytest.raises(ZeroDivisionError):
        with FakeTracer():
            1 / 0
    assert sys.gettrace() is before
    assert sys._getframe().f_trace is None


@needs_settrace
def test_a_trace_function_sees_the_lines_after_the_block(tmp_path: Path) -> None:
    text = """\
def run(trace):
    a = 1
    with trace():
        b = 2
    c = 3
    d = 4
    return d
"""
    run = load(text, tmp_path / "traced.py")["run"]
    lines: list[int] = []

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not run.__code__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
        return tracer

    sys.settrace(tracer)
    try:
        run(FakeTracer)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(None)
    assert [line for line in lines if line > 4] == [5, 6, 7]


@needs_settrace
def test_a_frame_keeps_its_own_trace_function() -> None:
    frame = sys._getframe()
    seen: list[str] = []

    def local(_: FrameType, event: str, __: object) -> Any:
        seen.append(event)
        return local

    sys.settrace(lambda *_: None)
    frame.f_trace = local
    try:
        with FakeTracer():
            x = 1
        assert frame.f_trace is local
        seen.clear()
        x += 1
        assert "line" in seen
    finally:
        sys.settrace(None)
        frame.f_trace = None
    assert x == 2


@pytest.mark.skipif(not importlib.util.find_spec("coverage"), reason="needs coverage")
@pytest.mark.parametrize("core", ["ctrace", "pytrace", "sysmon"])
def test_coverage_counts_every_line_around_and_in_the_block(core: str, tmp_path: Path) -> None:
    if core == "sysmon" and sys.version_info < (3, 12):
        pytest.skip("sys.monitoring came in 3.12")
    script = tmp_path / "covered.py"
    script.write_text(
        "from tests.capture.fake_tracer import FakeTracer\n"
        "def run():\n"
        "    with FakeTracer():\n"
        "        b = 2\n"
        "        c = 3\n"
        "    d = 4\n"
        "    e = 5\n"
        "    for _ in range(2):\n"
        "        e += 1\n"
        "    with FakeTracer() as t:\n"
        "        b += 1\n"
        "    with FakeTracer() as t:\n"
        "        try:\n"
        "            b += 1\n"
        "        finally:\n"
        "            b += 1\n"
        "    return b + c + d + e\n"
        "run()\n"
        "f = 6\n"
    )
    command = f"""
import coverage, runpy
c = coverage.Coverage(data_file=None, include=[{str(script)!r}], config_file=False)
c.start()
runpy.run_path({str(script)!r})
c.stop()
print(c.analysis2({str(script)!r})[3])
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={"PYTHONPATH": root, "COVERAGE_CORE": core},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_other_errors_are_not_taken_for_the_skip() -> None:
    with FakeTracer() as tracer:
        x = tracer.skip
    assert x is None
    first = skip.TracingSkip.__new__(skip.TracingSkip)
    skip.Skip.__init__(first, BodyStart(0, 0, is_before_target=False), sys._getframe())
    assert not first.is_own(None)
    assert not first.is_own(BodySkipped(object()))
    assert not first.is_own(ValueError())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring came in 3.12")
def test_a_skip_does_without_monitoring_when_no_tool_is_free() -> None:
    taken = [tool for tool in range(6) if sys.monitoring.get_tool(tool) is None]
    for tool in taken:
        sys.monitoring.use_tool_id(tool, "test")
    try:
        with FakeTracer() as tracer:
            thread = tracer.thread
            try:
                x = 1
            finally:
                y = 2
    finally:
        for tool in taken:
            sys.monitoring.free_tool_id(tool)
    assert (x, y) == (1, 2)
    assert thread == tracer.thread


class Question:
    """Asks, where it is made, whether it stands in a `with`."""

    def __init__(self) -> None:
        self.is_with_item = is_with_item(caller_frame())

    def __enter__(self) -> Question:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    async def __aenter__(self) -> Question:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


def test_a_call_knows_whether_it_is_the_item_of_a_with(tmp_path: Path) -> None:
    text = """\
from contextlib import nullcontext
def run(ask):
    with ask() as a:
        pass
    with nullcontext(), ask() as b, nullcontext():
        pass
    c = ask()
    with nullcontext(ask()) as d:
        pass
    with c:
        e = ask()
    f = [ask()]
    return [q.is_with_item for q in (a, b)], [q.is_with_item for q in (c, d, e, *f)]
async def arun(ask):
    async with ask() as a:
        return a.is_with_item
"""
    module = load(text, tmp_path / "asked.py")
    from tracekit.capture import frames

    frames._is_own[__file__] = True  # so that Question plays a part of tracekit
    try:
        assert module["run"](Question) == ([True, True], [False] * 4)
        assert module["run"](Question) == ([True, True], [False] * 4)
        with pytest.raises(StopIteration) as stop:
            module["arun"](Question).send(None)
        assert stop.value.value is True
    finally:
        del frames._is_own[__file__]
