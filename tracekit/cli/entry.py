"""From a command line to an exit status: parse, run one command, tell shortly what went wrong."""

# Imports no torch: `tracekit --help` answers at once. A command's module is imported to run it.

from __future__ import annotations

import importlib
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tracekit.cli import status
from tracekit.cli.arguments import parser
from tracekit.errors import TracekitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (cli/status.py says which there are)."""
    try:
        try:
            options = parser().parse_args(arguments)
            with _short_warnings():
                return _run(options)
        finally:
            sys.stdout.flush()  # here, where a pipe that is closed can still be told
    except BrokenPipeError:
        _close_quietly()
        return status.PIPE_CLOSED


def _run(options: Namespace) -> int:
    """What the command returns; of an error a line on standard error, or its traceback."""
    try:
        return importlib.import_module(options.module).run(options)
    except KeyboardInterrupt:
        _tell("interrupted")
        return status.INTERRUPTED
    except BrokenPipeError:
        raise
    except TracekitError as error:
        if _wants_traceback(options):
            raise
        _tell(str(error))
        return status.USER_ERROR
    except Exception as error:
        if _wants_traceback(options):
            raise
        _tell(f"{type(error).__name__}: {error}\n(--traceback shows where)")
        return status.BROKEN


def _wants_traceback(options: Namespace) -> bool:
    return options.traceback or os.environ.get("TRACEKIT_DEBUG", "") not in ("", "0")


def _tell(text: str) -> None:
    print(f"tracekit: {text}", file=sys.stderr)


@contextmanager
def _short_warnings() -> Generator[None]:
    """A warning is a line on standard error, without the place in a library that gave it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _tell(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _close_quietly() -> None:
    """Let the interpreter's last flush go nowhere: whoever read the output has left."""
    with suppress(OSError, ValueError):  # a standard output that is no file has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
