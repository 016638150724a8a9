"""The Python function that a callable runs in the end, under its decorators, and its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeAlias, cast, final

from tracekit.capture.locate import Source, parse, text_of
from tracekit.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


# Puts another function into the decorators that the one before it is in.
Rewrap: TypeAlias = "Callable[[FunctionType], Callable[..., Any]]"


def unwrap(call: Any) -> tuple[FunctionType, Rewrap]:
    """The function that `call` runs in the end, and how to put another one in its place.

    It is found through methods, partials and decorators (those that call what they close over).
    A decorator that does not hold the function it was given is shown as it is: there the function
    is what one of its operations calls. Raises SourceError where no Python function is run.
    """
    if hasattr(call, "_torchdynamo_orig_callable"):
        raise SourceError(
            f"{_name(call)} was compiled by torch.compile, which leaves no operations to stop at; "
            f"trace the model that was compiled (its `_orig_mod`)."
        )
    if isinstance(call, MethodType):
        owner = call.__self__
        function, rewrap = unwrap(call.__func__)
        return function, lambda new: MethodType(rewrap(new), owner)
    if isinstance(call, partial):
        bound = cast("partial[Any]", call)
        function, rewrap = unwrap(bound.func)
        return function, lambda new: partial(rewrap(new), *bound.args, **bound.keywords)
    if isinstance(call, FunctionType):
        return _under_decorator(call)
    if isinstance(call, type):
        raise SourceError(f"{_name(call)} is a class: making an object of it has no operations.")
    method: object = getattr(type(call), "__call__", None)  # noqa: B004 - which function it is
    if isinstance(method, FunctionType):
        return unwrap(MethodType(method, call))
    raise SourceError(
        f"{_name(call)} is not written in Python (a {type(call).__name__}): there are no "
        f"operations to stop at in it; its own input and output can be read and edited."
    )


def _under_decorator(outer: FunctionType) -> tuple[FunctionType, Rewrap]:
    wrapped = getattr(outer, "__wrapped__", None)
    cells = outer.__closure__ or ()
    held = [index for index, cell in enumerate(cells) if wrapped and _content(cell) is wrapped]
    if not held:
        return outer, lambda new: new
    function, rewrap = unwrap(wrapped)

    def rewrap_all(new: FunctionType) -> FunctionType:
        own = CellType(rewrap(new))
        closure = tuple(own if index in held else cell for index, cell in enumerate(cells))
        return function_like(outer, outer.__code__, closure)

    return function, rewrap_all


def function_like(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...]
) -> FunctionType:
    """A function like `function`, of the same globals and defaults, that runs `code`."""
    new = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__qualname__ = function.__qualname__
    new.__annotations__ = function.__annotations__
    new.__dict__.update(vars(function))
    return new


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _name(call: Any) -> str:
    name = getattr(call, "__qualname__", None) or type(call).__qualname__
    module = getattr(call, "__module__", None)
    return f"{module}.{name}" if isinstance(module, str) else str(name)


# --- its source ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Written:
    """A function in its source; `owner` is the class around it, which private names belong to."""

    source: Source
    node: FunctionNode
    owner: str | None


def written(function: FunctionType) -> list[Written]:
    """Where a function may be written: several, if there are lambdas on one line.

    Raises SourceError where its source is not available.
    """
    code = function.__code__
    text = text_of(code.co_filename, function.__globals__)
    if not text:
        raise SourceError(
            f"the source of {_name(function)} ({code.co_filename}:{code.co_firstlineno}) is not "
            f"available; define it in a file."
        )
    try:
        source = parse(code.co_filename, text)
    except SyntaxError as error:
        raise changed(function) from error
    return [
        Written(source, node, owner)
        for node, owner in _functions(source.tree, None)
        if _first_line(node) == code.co_firstlineno and _is_called(node, code.co_name)
    ]


def changed(function: FunctionType) -> SourceError:
    """The file is not what was imported."""
    code = function.__code__
    return SourceError(
        f"{code.co_filename} is not what {_name(function)} was made from: it changed since it was "
        f"imported, or the function was made by other means; start again, or define it in a file."
    )


def _functions(node: ast.AST, owner: str | None) -> Iterator[tuple[FunctionNode, str | None]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child, owner
        yield from _functions(child, child.name if isinstance(child, ast.ClassDef) else owner)


def _first_line(node: FunctionNode) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return decorators[0].lineno if decorators else node.lineno


def _is_called(node: FunctionNode, name: str) -> bool:
    return name == ("<lambda>" if isinstance(node, ast.Lambda) else node.name)
