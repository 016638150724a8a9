"""The lines that an error of a host shows here."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

import pytest

from tracekit.distributed.failures import Entry, Failure, error_of


@pytest.mark.parametrize(
    ("text_there", "shown"),
    [("1 / 0  # here\n", "1 / 0  # here"), ("", "1 / 0  # here"), ("another()\n", "")],
    ids=["the same file", "no such file on the host", "another file of that name"],
)
def test_a_line_is_shown_unless_the_host_s_file_says_otherwise(
    tmp_path: Path, text_there: str, shown: str
) -> None:
    path = tmp_path / "block.py"
    path.write_text("1 / 0  # here\n", "utf-8")
    linecache.checkcache(str(path))
    entry = Entry(str(path), "<module>", 1, None, None, None, text_there)
    error = error_of(
        Failure("builtins.ZeroDivisionError", "by zero", (entry,)),
        (ZeroDivisionError, ("by zero",), {}),
    )
    [line] = traceback.extract_tb(error.__traceback__)
    assert line.line == shown and line.lineno == 1
    assert line.filename == (str(path) if shown else f"{path} (on the host)")
