"""Exit statuses, short errors, quiet pipes: what a shell gets."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import tracekit
from tests.cli.conftest import Tell
from tracekit import cli
from tracekit.cli import output, status, tree
from tracekit.errors import LoadingError, TracekitWarning

ROOT = Path(__file__).parents[2]


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, **options)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(tree, "run", fail)


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys, contextlib\n"
        "from tracekit.cli import main\n"
        "for words in (['--help'], ['--version'], ['tree', '--help']):\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr
    assert f"tracekit {tracekit.__version__}" in done.stdout


@pytest.mark.parametrize("module", ["tracekit", "tracekit.cli"])
def test_python_m_is_the_command(module: str) -> None:
    done = shell("-m", module, "--version")
    assert (done.returncode, done.stdout) == (0, f"tracekit {tracekit.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tree", "tracekit/tin"], "did you mean 'tracekit/tiny'?"),
        (["tree", "no/such", "--offline"], "'no/such' can't be loaded"),
        (["tree", "--input", ""], "nothing to run"),
        (["tree", "--input", "a", "--device", "cuda:99"], "--device cuda:99: PyTorch"),
        (["doctor", "--device", "gpu"], "--device gpu: no device is called so"),
        (["tree", "--revision", "main"], "revision="),
    ],
)
def test_a_users_error_is_a_line_and_status_2(arguments: list[str], text: str, tell: Tell) -> None:
    told = tell(*arguments)
    assert told.status == status.USER_ERROR
    assert told.err.startswith("tracekit: ") and text in told.err
    assert "Traceback" not in told.err and len(told.err.splitlines()) == 1


def test_a_traceback_comes_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadingError):
        cli.main(["tree", "tracekit/tin", "--traceback"])
    monkeypatch.setenv("TRACEKIT_DEBUG", "1")
    with pytest.raises(LoadingError):
        cli.main(["tree", "tracekit/tin"])


def test_what_nobody_foresaw_is_short_too_and_status_3(
    monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    failing(monkeypatch, MemoryError("no room"))
    told = tell("tree")
    assert told.status == status.BROKEN
    assert told.err == "tracekit: MemoryError: no room\n(--traceback shows where)\n"


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    told = tell("tree")
    assert (told.status, told.err) == (130, "tracekit: interrupted\n")


@pytest.mark.parametrize(("words", "left"), [(["--help"], 0), (["tree"], status.PIPE_CLOSED)])
def test_a_reader_that_leaves_is_no_error(words: list[str], left: int) -> None:
    code = (
        "import sys, types; from tracekit.cli import main\n"
        "tree = types.ModuleType('tracekit.cli.tree')  # the real one would take long to import\n"
        "tree.run = lambda options: print('a branch') or 0\n"
        "sys.modules[tree.__name__] = tree\n"
        f"sys.exit(main({words!r}))"
    )
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -0` does, before anything is written
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], check=False, stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert (done.returncode, done.stderr) == (left, b"")


def test_a_warning_is_a_line(monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    def warn(_: object) -> int:
        warnings.simplefilter("default")  # in the place of pytest's "error"
        warnings.warn("mind the gap", TracekitWarning, stacklevel=1)
        return 0

    shown = warnings.showwarning
    monkeypatch.setattr(tree, "run", warn)
    assert tell("tree").err == "tracekit: warning: mind the gap\n"
    assert warnings.showwarning is shown


def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    assert "\x1b" not in tell("tree", "--depth", "0").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[1mmodule" in tell("tree", "--depth", "0").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in tell("tree", "--depth", "0").out


def test_lines_are_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    widest = max(map(len, tell("tree").out.splitlines()))
    monkeypatch.setenv("COLUMNS", "50")
    lines = tell("tree").out.splitlines()
    assert widest > 50 and max(map(len, lines)) == 50
    assert any(line.endswith("…") for line in lines)


def test_what_an_encoding_lacks_is_replaced() -> None:
    code = "from tracekit.cli.output import say; say('├── h … é')"
    done = shell("-c", code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.stdout, done.stderr) == ("|-- h ... ?\n", "")


def test_columns_count_what_a_terminal_shows() -> None:
    assert output.columns_of("abc") == 3
    assert output.columns_of("東京") == 4
    assert output.columns_of("e\u0301") == 1
    assert output.clipped("東京都", 5) == "東京…"
    assert output.table([["a", "1"], ["東京", "22"]], right=[1]) == ["a      1", "東京  22"]


def test_numbers_that_are_none_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_json({"a": float("nan"), "b": [float("inf"), 1.5], 3: None})
    assert "".join(capsys.readouterr().out.split()) == '{"a":null,"b":[null,1.5],"3":null}'
