"""Where blocks are written: files, the command line, doctests, archives, notebooks."""

from __future__ import annotations

import doctest
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import pytest

from tests.capture.fake_tracer import FakeTracer

ROOT = str(Path(__file__).parents[2])
HEAD = "from tests.capture.fake_tracer import FakeTracer\n"
BLOCK = HEAD + "with FakeTracer() as t:\n    x = 1\nprint(x)\n"


def python(
    *arguments: str, stdin: str | None = None, path: str = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        env={"PYTHONPATH": path, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(BLOCK)
    for arguments in ([], ["-O"], ["-X", "no_debug_ranges"]):
        done = python(*arguments, str(script))
        assert (done.stdout, done.stderr) == ("1\n", "")


def test_a_module_with_a_compiled_file(tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(BLOCK)
    import py_compile

    py_compile.compile(str(tmp_path / "compiled.py"))
    done = python("-c", "import compiled", path=f"{ROOT}:{tmp_path}")
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize("options", [["-c"], ["-Bc"], ["-W", "ignore", "-X", "utf8", "-c"]])
def test_the_command_line(options: list[str]) -> None:
    done = python(*options, BLOCK, "an argument")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_exec_on_the_command_line_is_refused_instead_of_taken_for_it() -> None:
    inner = "with FakeTracer() as t:\n    x = 2\n"
    outer = HEAD + f"exec({inner!r})\nwith FakeTracer() as t:\n    x = 1\n"
    done = python("-c", outer)
    assert "CaptureError" in done.stderr
    assert "put the block into a file" in done.stderr


def test_a_script_on_standard_input_is_refused() -> None:
    done = python("-", stdin=BLOCK)
    assert "CaptureError" in done.stderr
    assert "put the block into a file" in done.stderr


def test_a_doctest() -> None:
    text = """
    >>> from tests.capture.fake_tracer import FakeTracer
    >>> with FakeTracer() as t:
    ...     x = 1
    ...     y = x + 1
    >>> x, y
    (1, 2)
    >>> def f():
    ...     with FakeTracer():
    ...         z = 3
    ...     return z
    >>> f()
    3
    """
    test = doctest.DocTestParser().get_doctest(textwrap.dedent(text), {}, "mine", None, None)
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(test).failed == 0


def test_a_module_in_an_archive(tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped.py", BLOCK)
    done = python("-c", "import zipped", path=f"{ROOT}:{archive}")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_an_assert_that_pytest_rewrites_stands_beside_a_block() -> None:
    assert "@pytest_ar" in globals(), "this module's asserts are not rewritten"
    with FakeTracer():
        x = 1
        assert x == 1
    assert x == 1


def test_an_assert_that_fails_in_a_block_is_an_error_like_any_other() -> None:
    with pytest.raises(AssertionError):
        with FakeTracer():
            x = 1
            assert x == 2


@pytest.mark.skipif(sys.version_info < (3, 13), reason="the prompt keeps its source from 3.13 on")
def test_the_interactive_prompt() -> None:
    done = python("-i", "-q", stdin=HEAD + "with FakeTracer() as t:\n    x = 1\n\nprint(x)\n")
    assert done.stdout == "1\n", done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the prompt keeps its source")
def test_the_interactive_prompt_is_refused_where_it_keeps_no_source() -> None:
    done = python("-i", "-q", stdin=HEAD + "with FakeTracer() as t:\n    x = 1\n\n")
    assert "put the block into a file" in done.stderr


def test_a_debugger_steps_over_a_block_and_stops_after_it(tmp_path: Path) -> None:
    script = tmp_path / "debugged.py"
    script.write_text(BLOCK + "y = 2\nprint('end')\n")
    done = python("-m", "pdb", str(script), stdin="n\nn\nn\nn\nn\np ('x is', x)\nc\nq\n")
    assert "('x is', 1)" in done.stdout, done.stdout + done.stderr
    assert "print('end')" in done.stdout or "end" in done.stdout


def test_importing_capture_imports_no_torch() -> None:
    done = python("-c", "import sys, tracekit.capture; print(*sys.modules)")
    assert not {"torch", "astor", "transformers"} & set(done.stdout.split())


# --- notebooks -----------------------------------------------------------------------------------


@pytest.fixture
def shell() -> types.SimpleNamespace:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactive.InteractiveShell.instance()
    shell.user_ns["FakeTracer"] = FakeTracer
    return shell


CELLS = {
    "a cell": "with FakeTracer() as t:\n    x = 1\n",
    "several statements": "a = 0\nwith FakeTracer() as t:\n    x = a + 1\nx",
    "a line magic": "%precision 3\nwith FakeTracer() as t:\n    x = 1\n!true\n",
    "capture": "%%capture out\nwith FakeTracer() as t:\n    x = 1\n",
    "a function": "def f():\n    with FakeTracer():\n        y = 1\n    return y\nx = f()",
    "top-level await": "async def g(): return 1\na = await g()\nwith FakeTracer():\n    x = a\n",
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_cell(cell: str, shell: types.SimpleNamespace) -> None:
    for n in (1, 2, 2):
        shell.user_ns.pop("x", None)
        result = shell.run_cell(cell.replace("1", str(n)), store_history=True)
        result.raise_error()
        assert shell.user_ns["x"] == n


@pytest.mark.filterwarnings("ignore")
def test_a_timed_cell_is_refused(
    shell: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    result = shell.run_cell("%%time\nwith FakeTracer() as t:\n    x = 1\n")
    printed = capsys.readouterr().out  # older magics print the error and go on
    assert "put the block into a file" in str(result.error_in_exec) + printed
