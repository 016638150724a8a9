"""Execute the given notebooks in a throwaway copy of their folder, offline; exit 1 if a cell fails.

    python tools/run_notebooks.py tutorials/*.ipynb

The notebooks in the repository are stored without outputs, and stay so: that is checked too.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

# Errors only: the kernel warns at every start that its loopback ports are not encrypted.
QUIET = ["--IPKernelApp.log_level=40"]
CELL_TIMEOUT = 300  # seconds; the longest cell of a tutorial takes a few


def stored_outputs(notebook: nbformat.NotebookNode) -> list[int]:
    """The indices of the cells that were committed with outputs."""
    return [index for index, cell in enumerate(notebook.cells) if cell.get("outputs")]


def problem_of(path: Path) -> str | None:
    """Why the notebook does not pass, or None; runs it in a copy of its folder."""
    notebook = nbformat.read(path, as_version=4)
    if cells := stored_outputs(notebook):
        return f"cells {cells} are stored with outputs; clear them before committing"
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(path.parent, Path(scratch) / path.parent.name)
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            extra_arguments=QUIET,
            resources={"metadata": {"path": str(folder)}},
        )
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # IPython colours its tracebacks
    return None


def main(names: list[str]) -> int:
    """Run each notebook, print one line for each, and return the exit status."""
    failures = 0
    for path in map(Path, names):
        start = time.perf_counter()
        problem = problem_of(path)
        failures += problem is not None
        print(f"{path}: {'FAILED' if problem else 'ok'} in {time.perf_counter() - start:.1f} s")
        if problem:
            print(problem)
    print(f"notebooks: {len(names) - failures} ok, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
