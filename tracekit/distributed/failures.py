"""An error of a block, from a host to the client: its class, its text, and the user's own lines."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, TracebackType
from typing import Any, Final, final

from tracekit.capture import user_traceback
from tracekit.errors import RemoteError

_DEPTH: Final = 8  # causes and contexts that travel along


@final
@dataclass(frozen=True)
class Entry:
    """One line of a traceback; columns are None where Python does not tell them (3.10)."""

    filename: str
    function: str
    line: int
    end_line: int | None
    column: int | None
    end_column: int | None
    text: str


@final
@dataclass(frozen=True)
class Failure:
    """An error as data; the exception itself travels beside it, if it can."""

    kind: str  # its class
    text: str
    entries: tuple[Entry, ...]
    cause: Failure | None = None
    context: Failure | None = None
    suppresses_context: bool = False


def failure_of(error: BaseException, leave_out: CodeType | None = None, depth: int = 0) -> Failure:
    """What is told of an error; lines of the code `leave_out`, and of tracekit, are not."""
    cause, context = error.__cause__, error.__context__
    while context is not None and type(context).__module__.startswith("tracekit.capture."):
        context = context.__context__  # the skip of the block, which is no news
    is_shown = context is not None and not error.__suppress_context__
    return Failure(
        kind=f"{type(error).__module__}.{type(error).__qualname__}",
        text=_text_of(error),
        entries=tuple(_entries(user_traceback(error), leave_out)),
        cause=failure_of(cause, leave_out, depth + 1) if cause and depth < _DEPTH else None,
        context=failure_of(context, leave_out, depth + 1)
        if context is not None and is_shown and depth < _DEPTH
        else None,
        suppresses_context=error.__suppress_context__,
    )


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - the user's own __str__
        return f"<its text can't be had: {type(broken).__name__}>"


def _entries(chain: TracebackType | None, leave_out: CodeType | None) -> Iterator[Entry]:
    left_out = set[CodeType]() if leave_out is None else {leave_out, *_inner(leave_out)}
    while chain is not None:
        code = chain.tb_frame.f_code
        if code not in left_out:
            line = chain.tb_lineno
            end, column, end_column = _place(code, chain.tb_lasti, line)
            text = linecache.getline(code.co_filename, line, chain.tb_frame.f_globals)
            yield Entry(code.co_filename, code.co_name, line, end, column, end_column, text)
        chain = chain.tb_next


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _place(code: CodeType, offset: int, line: int) -> tuple[int | None, int | None, int | None]:
    if sys.version_info < (3, 11) or offset < 0:
        return None, None, None
    for number, place in enumerate(code.co_positions()):
        if number == offset // 2:
            start, end, column, end_column = place
            return (end, column, end_column) if start == line else (None, None, None)
    return None, None, None


# -- on the client --------------------------------------------------------------------------------


def error_of(failure: Failure, sent: Any) -> BaseException:
    """The error, of the class, arguments and attributes that were sent; else a RemoteError."""
    error: BaseException | None = None
    if sent is not None:
        with suppress(Exception):  # a class that can't be made of its arguments
            error = _made(*sent)
    if error is None:
        error = RemoteError(f"{failure.kind}, which can't be made here: {failure.text}")
    if failure.cause is not None:
        error.__cause__ = error_of(failure.cause, None)
    if failure.context is not None:
        error.__context__ = error_of(failure.context, None)
    error.__suppress_context__ = failure.suppresses_context
    return error.with_traceback(_chain(failure.entries))


def _made(kind: type[BaseException], args: tuple[Any, ...], attributes: Any) -> BaseException:
    """An error of that class, without a call of an `__init__` that is not Python's own."""
    if isinstance(kind.__init__, FunctionType):
        error = kind.__new__(kind, *args)
        error.args = args
    else:
        error = kind(*args)
    vars(error).update(attributes)
    return error


def _chain(entries: tuple[Entry, ...]) -> TracebackType | None:
    chain: TracebackType | None = None
    for entry in reversed(entries):
        made = _stand_in(entry if _is_line_here(entry) else _without_text(entry))
        chain = TracebackType(chain, made.tb_frame, made.tb_lasti, made.tb_lineno)
    return chain


def _is_line_here(entry: Entry) -> bool:
    """Whether it is the line of that file here; of what was sent as text, the host has no file."""
    return linecache.getline(entry.filename, entry.line) == entry.text or not entry.text


def _without_text(entry: Entry) -> Entry:
    """A line of a file that is another one here: shown by number, never with the wrong text."""
    name = f"{entry.filename} (on the host)"
    return replace(entry, filename=name, end_line=None, column=None, end_column=None)


def _stand_in(entry: Entry) -> TracebackType:
    """A traceback of one line that looks as that one did, made by raising on that very line."""
    place: dict[str, Any] = {
        "lineno": entry.line,
        "end_lineno": entry.end_line or entry.line,
        "col_offset": entry.column or 0,
        "end_col_offset": entry.end_column or entry.column or 0,
    }
    raising = ast.Raise(ast.Name("Exception", ast.Load(), **place), None, **place)
    code = compile(ast.Module([raising], []), entry.filename, "exec")
    names: dict[str, Any] = {"co_name": entry.function}
    if sys.version_info >= (3, 11):
        names["co_qualname"] = entry.function
    try:
        exec(code.replace(**names), {})
    except Exception as raised:  # noqa: BLE001 - the one that is raised here
        here: Any = raised.__traceback__
        return here.tb_next
    raise AssertionError
