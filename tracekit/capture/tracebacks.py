"""Show users their own lines: tracebacks without the frames of tracekit."""

# The way to raise a body's error from `__exit__`, which runs while the skip exception is handled:
#
#     context = error.__context__
#     try:
#         raise error
#     except BaseException as raised:
#         show_own_lines(raised, context)
#         raise
#
# The bare `raise` adds no entry for its own frame, so what is left is the user's `with` line and
# the user's lines of the body.

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar, cast

from tracekit.capture.frames import is_dispatch_file, is_own_file

P = ParamSpec("P")
R = TypeVar("R")


def user_traceback(error: BaseException) -> TracebackType | None:
    """The error's traceback without the frames of tracekit, and of torch inside an operation."""
    entries: list[TracebackType] = []
    entry = error.__traceback__
    while entry is not None:
        if not _is_machinery(entry):
            entries.append(entry)
        entry = entry.tb_next
    chain: TracebackType | None = None
    for kept in reversed(entries):
        line = cast("int | None", kept.tb_lineno)  # None if Ctrl-C came before a call's first line
        first = kept.tb_frame.f_code.co_firstlineno
        chain = TracebackType(chain, kept.tb_frame, kept.tb_lasti, first if line is None else line)
    return chain


def drop_machinery(error: BaseException) -> None:
    """Take the frames of the tracekit package out of a traceback that begins in the user's frame.

    The chain itself is changed: an error on its way out of a `with` goes on with the head it has.
    """
    entry = error.__traceback__
    while entry is not None:
        after = entry.tb_next
        while after is not None and _is_machinery(after):
            after = after.tb_next
        entry.tb_next = entry = after


def _is_machinery(entry: TracebackType) -> bool:
    filename = entry.tb_frame.f_code.co_filename
    return is_own_file(filename) or is_dispatch_file(filename)


def show_own_lines(error: BaseException, context: BaseException | None) -> None:
    """Prepare a caught error for a bare `raise`: its own context, and only the user's lines.

    Raising it in `__exit__` had put the skip exception in the place of its context.
    """
    error.__context__ = context
    chain = user_traceback(error)
    if sys.version_info < (3, 11) and error.__traceback__ is not None and chain is not None:
        _overwrite(error.__traceback__, chain)
    else:
        error.__traceback__ = chain


def showing_own_lines(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, for users to call: its errors show their lines, and none of tracekit's."""

    @wraps(function)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            show_own_lines(error, error.__context__)
            raise

    return shown


def _overwrite(head: TracebackType, entry: TracebackType) -> None:
    """Make `head` say what `entry` says.

    A bare `raise` of 3.10 goes on with the head it caught, whatever `__traceback__` says by then,
    and of a head only `tb_next` can be written; so the rest is written into its memory, which
    every 3.10 lays out alike: head of the object, tb_next, tb_frame, tb_lasti, tb_lineno.
    """
    if object.__basicsize__ != 16 or sys.implementation.name != "cpython":
        head.tb_next = entry
        return
    head.tb_next = entry.tb_next
    start, own_frame = id(head), head.tb_frame
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(entry.tb_frame))
    ctypes.c_void_p.from_address(start + 24).value = id(entry.tb_frame)
    ctypes.c_int.from_address(start + 32).value = entry.tb_lasti
    ctypes.c_int.from_address(start + 36).value = entry.tb_lineno
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(own_frame))
