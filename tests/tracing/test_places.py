"""Blocks where Python keeps no file of them: standard input, a prompt, the command line, cells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tracing.plain import X, small
from tracekit import Model

ROOT = str(Path(__file__).parents[2])
HEAD = "import torch; from tests.tracing.plain import X, small; from tracekit import Model\n"
MAKE = "net = small(); model = Model(net)\n"
BLOCK = "with model.trace(X) as t:\n    model[1].output = model[0].output * 2\n    y = t.result\n\n"
CHECK = "print('right', torch.equal(y, net[2](net[0](X) * 2)), t.explain()[:23])\n"
LIFTED, IN_PLACE = "right True The block was lifted ou", "right True The block ran in place,"


def python(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        env={"PYTHONPATH": ROOT, "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_block_on_the_command_line() -> None:
    done = python("-c", HEAD + MAKE + BLOCK + CHECK)
    assert done.stdout.strip() == LIFTED, done.stderr


def test_a_script_on_standard_input_that_ends_with_a_suspended_block() -> None:
    """The interpreter's end is the end of the generator, when no other thread runs any more."""
    suspended = (
        "def values():\n    with model.trace(X):\n        yield model[0].output\n\n"
        "kept = values()\nprint(next(kept).shape == X.shape)\n"
    )
    done = python("-", stdin=HEAD + MAKE + BLOCK + CHECK + suspended)
    assert done.stdout.split("\n")[:2] == [IN_PLACE, "True"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no terminals of this kind")
def test_a_block_at_the_prompt_of_a_terminal() -> None:
    import pty

    leader, follower = pty.openpty()
    environment = {
        "PYTHONPATH": ROOT,
        "HOME": "/nonexistent",
        "TERM": "dumb",
        "PYTHON_BASIC_REPL": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-i", "-q"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        close_fds=True,
    ) as prompt:
        os.close(follower)
        os.write(leader, (HEAD + MAKE + BLOCK + CHECK + "exit()\n").encode())
        shown = bytearray()
        while True:
            try:
                got = os.read(leader, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not got:
                break
            shown += got
        assert prompt.wait(60) == 0
    os.close(leader)
    expected = LIFTED if sys.version_info >= (3, 13) else IN_PLACE
    assert expected in shown.decode(), shown.decode()


CELLS = {
    "a cell": BLOCK,
    "a cell with return in a function": BLOCK.replace("with", "def f():\n  with")
    .replace("    ", "      ")
    .replace("y = t.result", "return t.result, t")
    + "y, t = f()",
    "time": "%%time\n" + BLOCK,
    "await in the block": "import asyncio\n"
    + BLOCK.replace("    y", "    await asyncio.sleep(0)\n    y"),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_cell(cell: str) -> None:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    shell: SimpleNamespace = interactive.InteractiveShell.instance()
    net = small()
    shell.user_ns.update(model=Model(net), X=X)
    for _ in range(2):
        shell.user_ns.pop("y", None)
        shell.run_cell(cell, store_history=True).raise_error()
        assert torch.equal(shell.user_ns["y"], net[2](net[0](X) * 2))
