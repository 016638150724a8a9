"""An error in a block shows the user's own lines, and only those."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import TracebackType

import pytest

from tests.capture import fake_tracer
from tests.capture.fake_tracer import FakeTracer, load
from tracekit.capture import user_traceback

TEXT = """\
def helper():
    raise KeyError("inner")
def run(trace):
    with trace():
        x = 1
        y = 1 / 0
def chained(trace):
    with trace():
        try:
            helper()
        except KeyError:
            raise ValueError("outer")
def caused(trace):
    with trace():
        try:
            helper()
        except KeyError as error:
            raise ValueError("outer") from error
def nested(trace):
    with trace():
        with trace():
            helper()
"""


def lines_of(error: BaseException, path: Path) -> list[int]:
    """The lines of the error's traceback, after checking that all are of the user's file."""
    entries = traceback.extract_tb(error.__traceback__)[1:]  # the first is this test's own
    assert {entry.filename for entry in entries} == {str(path)}
    return [entry.lineno or 0 for entry in entries]


@pytest.mark.parametrize(
    ("name", "lines"), [("run", [4, 6]), ("nested", [20, 21, 22, 2])], ids=["run", "nested"]
)
def test_a_traceback_holds_the_with_line_and_the_lines_of_the_block(
    name: str, lines: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "failing.py"
    function = load(TEXT, path)[name]
    with pytest.raises((ZeroDivisionError, KeyError)) as caught:
        function(FakeTracer)
    assert lines_of(caught.value, path) == lines
    assert caught.value.__context__ is None
    entry = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert entry.name == (name if name == "run" else "helper")


@pytest.mark.parametrize("name", ["chained", "caused"])
def test_an_error_keeps_its_own_context_and_cause(name: str, tmp_path: Path) -> None:
    function = load(TEXT, tmp_path / "chained.py")[name]
    with pytest.raises(ValueError, match="outer") as caught:
        function(FakeTracer)
    assert isinstance(caught.value.__context__, KeyError)
    assert caught.value.__context__.__context__ is None
    assert isinstance(caught.value.__cause__, KeyError) is (name == "caused")
    printed = "".join(traceback.format_exception(caught.value))
    assert "BodySkipped" not in printed
    assert "fake_tracer.py" not in printed


@pytest.mark.skipif(sys.version_info < (3, 11), reason="columns came in 3.11")
def test_a_traceback_marks_the_columns_of_the_failing_part(tmp_path: Path) -> None:
    function = load(TEXT, tmp_path / "columns.py")["run"]
    with pytest.raises(ZeroDivisionError) as caught:
        function(FakeTracer)
    entry = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (entry.line, entry.colno, entry.end_colno) == ("y = 1 / 0", 12, 17)


def test_an_error_without_traceback_has_no_user_traceback() -> None:
    assert user_traceback(ValueError()) is None


def test_an_error_of_tracekit_alone_has_no_lines_left() -> None:
    def raise_here() -> TracebackType | None:
        try:
            raise ValueError
        except ValueError as error:
            own = fake_tracer.frames._is_own
            own[__file__] = True
            try:
                return user_traceback(error)
            finally:
                del own[__file__]

    assert raise_here() is None


def test_an_error_that_is_not_the_skip_passes_through(tmp_path: Path) -> None:
    """`with trace() as box[0]` can fail while the target is bound, before the body."""
    text = "def run(trace, box):\n    with trace() as box[0]:\n        x = 1\n"
    run = load(text, tmp_path / "target.py")["run"]
    before = sys.gettrace()
    with pytest.raises(IndexError):
        run(FakeTracer, [])
    assert sys.gettrace() is before
    with pytest.raises(TypeError):
        run(FakeTracer, ())
    box = [0]
    run(FakeTracer, box)
    assert isinstance(box[0], FakeTracer)
