"""Find the `with` statement that a frame is entering, in the source that really runs."""

from __future__ import annotations
import __future__

import ast
import linecache
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final, final

from tracekit.capture.bytecode import with_sites
from tracekit.capture.percode import PerCode
from tracekit.capture.samecode import is_alike, is_same
from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

FUTURES: Final = sum(
    getattr(__future__, name).compiler_flag for name in __future__.all_feature_names
)
_WAY_OUT: Final = "put the block into a file, or into a function in a file"
_KEPT_FILES: Final = 64  # parsed sources; one is a few MB for the largest files


@final
@dataclass(frozen=True, eq=False)
class Source:
    """One version of one file."""

    filename: str
    text: str
    tree: ast.Module


@final
@dataclass(frozen=True, eq=False)
class Place:
    """A `with` statement in its source."""

    source: Source
    statement: ast.With
    item: int  # which of the statement's managers is entered
    enclosing: tuple[ast.AST, ...]  # classes and functions around it, outermost first


_made_here: PerCode[Source] = PerCode()


def remember_origin(code: CodeType, source: Source) -> None:
    """Note that `code` was compiled here from `source`, so that a block inside a block is found."""
    _made_here.put(code, source)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            remember_origin(constant, source)


def locate(frame: FrameType) -> Place:
    """The `with` statement that `frame` is entering.

    Raises CaptureError where its source is not available, or is not what runs.
    """
    if frame.f_lasti not in with_sites(frame.f_code).entries:
        raise CaptureError(
            f"{_here(frame)} enters a trace without a `with` statement (an ExitStack, or a call of "
            "__enter__); write `with model.trace(...):`"
        )
    source = _made_here.get(frame.f_code) or _checked_source(frame)
    return _find(source, frame)


def _here(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# --- the text ------------------------------------------------------------------------------------


def _checked_source(frame: FrameType) -> Source:
    code = frame.f_code
    text = text_of(code.co_filename, frame.f_globals)
    if not text:
        raise CaptureError(
            f"the source of the block at {_here(frame)} is not available; {_WAY_OUT}"
        )
    try:
        source = parse(code.co_filename, text)
        is_fresh = _is_source_of(source, frame)
    except SyntaxError as error:
        raise CaptureError(_changed(frame)) from error
    if not is_fresh:
        raise CaptureError(_changed(frame))
    return source


def _changed(frame: FrameType) -> str:
    filename = frame.f_code.co_filename
    if filename.startswith("<"):
        found = "what is found there is another text"
        return f"the source of the block at {_here(frame)} is not available ({found}); {_WAY_OUT}"
    return (
        f"{filename} changed since it was imported, so its line {frame.f_lineno} may be another "
        "block; reload the module, or start again"
    )


def text_of(filename: str, namespace: dict[str, Any]) -> str:
    """The text of a file as it is now, or of a notebook's cell; nothing where there is none."""
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, namespace)
    if not lines and filename == "<string>":
        return _command_line_text()
    return "".join(lines)


def _command_line_text() -> str:
    """The text of `python -c TEXT`, which Python itself keeps only from 3.13 on."""
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if not argument.startswith("-") or argument.startswith("--"):
            return ""
        if argument in {"-X", "-W"}:
            next(arguments, None)
        elif "c" in argument and not argument.startswith(("-X", "-W")):
            return argument.split("c", 1)[1] or next(arguments, "")
    return ""


@contextmanager
def quiet_compiler() -> Generator[None]:
    """Python has warned about this text already, when the user's module was compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=_KEPT_FILES)
def parse(filename: str, text: str) -> Source:
    """The file, parsed once for each text; SyntaxError as `ast.parse` raises it."""
    with quiet_compiler():
        return Source(filename, text, ast.parse(text, filename))


# --- is it the text that runs? -------------------------------------------------------------------


def _is_source_of(source: Source, frame: FrameType) -> bool:
    code = frame.f_code
    if _is_notebook_cell(code.co_filename):
        return True
    matches = is_alike if is_rewritten_on_import(frame.f_globals) else _is_equal
    return any(
        matches(candidate, code)
        for compiled in _compiled_forms(source, code)
        for candidate in _code_objects(compiled)
        if (candidate.co_name, candidate.co_firstlineno) == (code.co_name, code.co_firstlineno)
    )


def _is_notebook_cell(filename: str) -> bool:
    """Cells are named after a hash of their text, and may be compiled statement by statement."""
    return filename.startswith("<ipython-input-") or "ipykernel_" in filename


def is_rewritten_on_import(namespace: dict[str, Any]) -> bool:
    """Has pytest, or a runtime type checker, its own loader for this module?"""
    loader = namespace.get("__loader__")
    plain = {"importlib._bootstrap_external", "_frozen_importlib_external", "zipimport", "builtins"}
    owner = loader.__module__ if isinstance(loader, type) else type(loader).__module__
    return "@pytest_ar" in namespace or owner not in plain | {"_frozen_importlib"}


def _compiled_forms(source: Source, code: CodeType) -> Iterator[CodeType]:
    flags = code.co_flags & FUTURES
    yield _compile(source.filename, source.text, flags, "exec")
    if len(source.tree.body) == 1:  # doctest and the interactive prompt
        yield _compile(source.filename, source.text, flags, "single")


@lru_cache(maxsize=_KEPT_FILES)
def _compile(filename: str, text: str, flags: int, mode: str) -> CodeType:
    with quiet_compiler():
        return compile(text, filename, mode, flags=flags, dont_inherit=True)


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)


def _is_equal(found: object, running: object) -> bool:
    if not isinstance(found, CodeType) or not isinstance(running, CodeType):
        return type(found) is type(running) and found == running
    is_on_same_lines = list(found.co_lines()) == list(running.co_lines())
    return is_on_same_lines and is_same(found, running, _is_equal)


# --- the statement -------------------------------------------------------------------------------


def _find(source: Source, frame: FrameType) -> Place:
    line, column = _position(frame.f_code, frame.f_lasti, frame.f_lineno)
    for statement, enclosing in _with_statements(source.tree, ()):
        item = _item(statement, line, column, frame)
        if item is None:
            continue
        if isinstance(statement, ast.AsyncWith):
            raise CaptureError(f"{_here(frame)} opens a trace with `async with`; write `with`")
        return Place(source, statement, item, enclosing)
    raise CaptureError(f"no `with` statement was found at {_here(frame)}; {_WAY_OUT}")


def _position(code: CodeType, offset: int, line: int) -> tuple[int, int | None]:
    """The start of the whole statement up to 3.12, of its item from 3.13 on (as in `ast`)."""
    if sys.version_info < (3, 11):
        return line, None
    start, _, column, _ = next(islice(code.co_positions(), offset // 2, None))
    return start or line, column


def _item(
    statement: ast.With | ast.AsyncWith, line: int, column: int | None, frame: FrameType
) -> int | None:
    """The index of the manager that is entered, if this is the statement.

    No two `with` statements begin on one line, so up to 3.12 the line tells.
    """
    if sys.version_info >= (3, 13):
        starts = [
            (item.context_expr.lineno, item.context_expr.col_offset) for item in statement.items
        ]
        matches = [
            index
            for index, start in enumerate(starts)
            if start[0] == line and column in (None, start[1])
        ]
        rank = _entry_rank(frame.f_code, frame.f_lasti) if len(matches) > 1 else 0
        return matches[rank % len(matches)] if matches else None
    return (
        _entry_rank(frame.f_code, frame.f_lasti) % len(statement.items)
        if statement.lineno == line
        else None
    )


def _entry_rank(code: CodeType, offset: int) -> int:
    """How many managers of that line are entered before (a `finally` may be there twice)."""
    lines = {start: line for begin, end, line in code.co_lines() for start in range(begin, end, 2)}
    return sum(
        lines[entry] == lines[offset] for entry in with_sites(code).entries if entry < offset
    )


def _with_statements(
    node: ast.AST, enclosing: tuple[ast.AST, ...]
) -> Iterator[tuple[ast.With | ast.AsyncWith, tuple[ast.AST, ...]]]:
    if isinstance(node, (ast.With, ast.AsyncWith)):
        yield node, enclosing
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        enclosing = (*enclosing, node)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _with_statements(child, enclosing)
