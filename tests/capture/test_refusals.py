"""What cannot be lifted is refused before anything runs, with its line and the way out."""

from __future__ import annotations

import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.capture.fake_tracer import FakeTracer, load
from tracekit.errors import CaptureError

REFUSED = {
    "return": ("return 1", "`return` .* move it after the block"),
    "return in a loop": ("for _ in [1]: return 1", "`return`"),
    "yield": ("yield 1", "`yield` .* move it after the block"),
    "yield from": ("yield from [1]", "`yield from`"),
    "yield in an expression": ("x = [(yield)]", "`yield`"),
    "raise alone": ("raise", "`raise` .* name the error"),
    "break": ("break", "`break` .* the loop is outside; move it after the block"),
    "continue": ("continue", "`continue` .* the loop is outside"),
    "break in an else": ("for _ in []: pass\n        else: break", "`break`"),
}
ASYNC = {
    "await": ("await x", "`await` .* move it after the block"),
    "async for": ("async for _ in x: pass", "`async for`"),
    "async with": ("async with x: pass", "`async with`"),
    "async comprehension": ("y = [_ async for _ in x]", "`async for` .* called in the block"),
    "await in a comprehension": ("y = [await _ for _ in x]", "`await`"),
    "await in a default": ("y = lambda z=await x: z", "`await`"),
}


@pytest.mark.parametrize(("statement", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_leaves_the_block_is_refused(statement: str, message: str, tmp_path: Path) -> None:
    text = f"""\
def run(trace, ran):
    while not ran:
      with trace():
        ran.append(1)
        {statement}
"""
    ran: list[int] = []
    run = load(text, tmp_path / "refused.py")["run"]
    with pytest.raises(CaptureError, match=message) as caught:
        list(run(FakeTracer, ran) or ())
    assert "refused.py:" in str(caught.value)
    assert not ran
    assert sys.gettrace() is None or "coverage" in repr(sys.gettrace())


@pytest.mark.parametrize(("statement", "message"), ASYNC.values(), ids=ASYNC.keys())
def test_what_suspends_the_function_is_refused(
    statement: str, message: str, tmp_path: Path
) -> None:
    text = f"async def run(trace, x=None):\n    with trace():\n        {statement}\n"
    run = load(text, tmp_path / "suspended.py")["run"]
    with pytest.raises(CaptureError, match=f"suspended.py:3: {message}"):
        run(FakeTracer).send(None)


def test_an_import_of_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"star.py:2: `import \*` .* before the block"):
        load("with trace():\n    from os import *\n", tmp_path / "star.py", trace=FakeTracer)


def test_a_manager_after_the_trace_is_refused(tmp_path: Path) -> None:
    text = """\
        from contextlib import nullcontext
        def first(trace):
            with trace() as t, nullcontext(1) as one:
                x = one
        def middle(trace):
            with (
                nullcontext(),
                trace() as t,
                nullcontext(1) as one,
            ):
                x = one
    """
    module = load(textwrap.dedent(text), tmp_path / "order.py")
    for name in ("first", "middle"):
        with pytest.raises(CaptureError, match=r"`nullcontext\(1\)` .* put the trace last"):
            module[name](FakeTracer)


def test_an_exit_stack_is_refused() -> None:
    with ExitStack() as stack, pytest.raises(CaptureError, match="without a `with`"):
        stack.enter_context(FakeTracer())


def test_a_call_of_enter_is_refused() -> None:
    with pytest.raises(CaptureError, match="without a `with`"):
        FakeTracer().__enter__()


def test_code_without_source_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"not available.* put the block into a file"):
        exec("with trace():\n    x = 1\n", {"trace": FakeTracer})


@pytest.mark.parametrize(
    "edited",
    ["# a line more\n{}", "{}", "", "with"],
    ids=["shifted", "another constant", "emptied", "broken"],
)
def test_a_file_that_changed_since_its_import_is_refused(edited: str, tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    text = "def run(trace):\n    with trace():\n        x = 1\n    return x\n"
    run = load(text, path)["run"]
    path.write_text(edited.format(text.replace("x = 1", "x = 1000")))
    with pytest.raises(CaptureError, match=r"changed since it was imported|not available"):
        run(FakeTracer)


def test_a_file_that_changed_after_the_first_run_still_runs_what_was_imported(
    tmp_path: Path,
) -> None:
    path = tmp_path / "warm.py"
    text = "def run(trace):\n    with trace():\n        x = 1\n    return x\n"
    run = load(text, path)["run"]
    assert run(FakeTracer) == 1
    path.write_text(text.replace("x = 1", "x = 1000"))
    assert run(FakeTracer) == 1
    assert load(path.read_text(), path)["run"](FakeTracer) == 1000


@pytest.mark.parametrize(
    "body",
    ["x = outside", "x = __private", "def m(self): super().m()", "def m(self): self.__p = 1"],
)
def test_a_block_in_a_class_body_cannot_use_what_only_the_class_can_mean(
    body: str, tmp_path: Path
) -> None:
    text = f"""\
def run(trace, outside=1):
    class K:
        with trace():
            {body}
    return K
"""
    run = load(text, tmp_path / "klass.py")["run"]
    with pytest.raises(CaptureError, match=r"klass.py:4: .* move it out of the class"):
        run(FakeTracer)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="earlier frames can unbind")
def test_unbinding_what_was_bound_before_the_block_is_refused_where_python_cannot() -> None:
    x = 1
    with pytest.raises(CaptureError, match=r"unbinds x.* assign None instead"):
        with FakeTracer():
            y = x + 1
            del x
    assert y == 2


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="later frames cannot unbind")
def test_what_the_block_deletes_is_unbound() -> None:
    x = 1
    with FakeTracer():
        del x
    with pytest.raises(UnboundLocalError):
        x  # noqa: F821


def test_an_async_with_is_refused(tmp_path: Path) -> None:
    class Async(FakeTracer):
        pass

    text = "async def run(trace):\n    async with trace() as t:\n        x = 1\n"
    run = load(text, tmp_path / "asynchronous.py")["run"]

    def enter(self: FakeTracer) -> object:
        return FakeTracer.__enter__(self)

    Async.__aenter__ = enter  # type: ignore[attr-defined]
    Async.__aexit__ = FakeTracer.__exit__  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match=r"write `with`|without a `with`"):
        run(Async).send(None)
