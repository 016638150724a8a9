"""A block as text that runs elsewhere: its `with` statement, and which names it uses and binds."""

# What is compiled from it where it runs, at the lines and columns of the user's own file:
#
#     class C:                          # only in a class C: private names are mangled as there
#         def f(<the names it reads>):  # only in a function f
#             global ...
#             try:
#                 with <the trace> as tracer:
#                     <the statements>
#             finally:
#                 <hand back>(locals())

from __future__ import annotations

import ast
import builtins
import linecache
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final, cast, final

from tracekit.capture.locate import Source, quiet_compiler, remember_origin
from tracekit.capture.reads import names_read
from tracekit.capture.rewrite import HIDDEN
from tracekit.capture.scope import own_names
from tracekit.capture.variables import bind, forget_snapshot

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from tracekit.capture.block import Block

TRACE: Final = f"{HIDDEN}trace"  # the names by which the code finds what it is given
HAND_BACK: Final = f"{HIDDEN}hand back"
_NOT_THERE: Final = object()


@final
@dataclass(frozen=True)
class Shipped:
    """A `with` statement as it stands in its file; refers to no frame, value or code object."""

    text: str  # of the whole statement, in its own indentation
    filename: str
    line: int  # of its first line, from 1
    function: str  # around it; "<module>" if none
    module: str  # the `__name__` of its file
    owner: str | None  # the class around it
    parameters: tuple[str, ...]  # of a function: its names that the block reads or binds
    declared: tuple[str, ...]  # of a function: names outside of it that the block binds
    is_in_function: bool
    may_unbind: tuple[str, ...]  # names that the block may delete

    def lines(self) -> list[str]:
        """The lines of the text, each with its end."""
        return [f"{line}\n" for line in self.text.split("\n")]


def ship(block: Block, frame: FrameType) -> tuple[Shipped, dict[str, object]]:
    """The block as text, and the values of the names that it may read, as they are in `frame`."""
    statement = block.place.statement
    reads = _names_read(block)
    try:
        local = dict(frame.f_locals)
        values = _values(reads, local, frame)
    finally:
        forget_snapshot(frame)
    is_in_function = block.names.is_function
    own = own_names(block.place, block.names) if is_in_function else frozenset[str]()
    bound = set(_bound(statement.body))
    owners = [node.name for node in block.place.enclosing if isinstance(node, ast.ClassDef)]
    shipped = Shipped(
        text="\n".join(_lines_of(block)),
        filename=block.filename,
        line=statement.lineno,
        function=block.function_name,
        module=str(frame.f_globals.get("__name__", "__main__")),
        owner=owners[-1] if owners and is_in_function else None,
        parameters=tuple(sorted(own & set(values))),
        declared=tuple(sorted(bound - own)) if is_in_function else (),
        is_in_function=is_in_function,
        may_unbind=tuple(sorted(_unbound(statement.body) & set(local))),
    )
    return shipped, values


def hand_back(
    block: Block, frame: FrameType, values: Mapping[str, object], removed: tuple[str, ...]
) -> None:
    """Bind in the user's frame what the block bound elsewhere."""
    own = block.names.all if block.names.is_function else None
    outside = {} if own is None else {name: values[name] for name in values if name not in own}
    try:
        inside = {name: value for name, value in values.items() if name not in outside}
        if inside or removed:
            bind(frame, inside, removed)
        frame.f_globals.update(outside)
    finally:
        forget_snapshot(frame)


def _names_read(block: Block) -> set[str]:
    statement = block.place.statement
    target = statement.items[block.place.item].optional_vars
    bare = ast.With(
        [ast.withitem(ast.Constant(None), target)], [*statement.body], lineno=1, col_offset=0
    )
    reads = names_read([bare])
    spelled = {node.id for node in ast.walk(bare) if isinstance(node, ast.Name)}
    return {name for name in spelled if name in reads}


def _values(reads: set[str], local: Mapping[str, object], frame: FrameType) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in sorted(reads):
        value = local.get(name, frame.f_globals.get(name, _NOT_THERE))
        if value is not _NOT_THERE and value is not getattr(builtins, name, _NOT_THERE):
            found[name] = value
    return found


def _bound(statements: list[ast.stmt]) -> Iterator[str]:
    """The names that the statements themselves bind, not those of functions and classes in them."""
    for node in _own_nodes(statements):
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (each.asname or each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest


def _own_nodes(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = list(statements)
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, comprehensions):
            waiting += [each for each in ast.walk(node) if isinstance(each, ast.NamedExpr)]
        elif not isinstance(node, inner):
            waiting += ast.iter_child_nodes(node)


def _unbound(statements: list[ast.stmt]) -> set[str]:
    handlers = {
        node.name
        for node in _own_nodes(statements)
        if isinstance(node, ast.ExceptHandler) and node.name
    }
    return handlers | {
        node.id
        for node in _own_nodes(statements)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Del)
    }


def _lines_of(block: Block) -> list[str]:
    statement = block.place.statement
    lines = block.place.source.text.split("\n")
    return lines[statement.lineno - 1 : statement.end_lineno]


# -- where it runs --------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def compiled(shipped: Shipped) -> CodeType:
    """The code of a module that runs the statement, or, in a function, defines that function.

    A traceback has its lines as they are in the user's file; `is_wrapper` knows its own frames.
    """
    is_indented = shipped.text[:1] in (" ", "\t")
    above = "\n" * (shipped.line - 1 - is_indented) + ("if True:\n" if is_indented else "")
    text = above + shipped.text + "\n"
    with quiet_compiler():
        outer = ast.parse(text, shipped.filename).body[0]
    statement: Any = cast("Any", outer).body[0] if is_indented else outer
    statement.items = [_item(statement.items[-1])]
    tree = ast.Module([_around(shipped, statement)], [])
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.arg)) and not hasattr(node, "lineno"):
            ast.copy_location(node, statement)
    with quiet_compiler():
        code = compile(ast.fix_missing_locations(tree), shipped.filename, "exec", dont_inherit=True)
    remember_origin(code, Source(shipped.filename, text, tree))
    return code


def _item(item: ast.withitem) -> ast.withitem:
    trace = ast.copy_location(ast.Name(TRACE, ast.Load()), item.context_expr)
    return ast.withitem(trace, item.optional_vars)


def _around(shipped: Shipped, statement: ast.stmt) -> ast.stmt:
    if not shipped.is_in_function:
        return statement
    locals_now = ast.Call(ast.Name("locals", ast.Load()), [], [])
    last = ast.Expr(ast.Call(ast.Name(HAND_BACK, ast.Load()), [locals_now], []))
    body: list[ast.stmt] = [ast.Try([statement], [], [], [last])]
    if shipped.declared:
        body.insert(0, ast.Global(list(shipped.declared)))
    names = [ast.arg(name) for name in sorted({*shipped.parameters, *shipped.may_unbind})]
    arguments = ast.arguments([], names, None, [], [], None, [])
    name = shipped.function if shipped.function.isidentifier() else "block"
    more: dict[str, Any] = {"type_params": []} if "type_params" in ast.FunctionDef._fields else {}
    function = ast.FunctionDef(name, arguments, body, [], None, None, **more)
    if shipped.owner is None:
        return function
    return ast.ClassDef(shipped.owner, [], [], [function], [], **more)


def function_of(shipped: Shipped, namespace: dict[str, Any]) -> Any:
    """The function that the code defined in `namespace`."""
    name = shipped.function if shipped.function.isidentifier() else "block"
    if shipped.owner is None:
        return namespace.pop(name)
    return vars(namespace.pop(shipped.owner))[name]


@contextmanager
def lines_shown(shipped: Shipped) -> Generator[None]:
    """While within, tracebacks and `inspect` find the statement's lines under its file name."""
    name, lines = shipped.filename, shipped.lines()
    start = shipped.line - 1
    known = linecache.getlines(name)
    if known[start : start + len(lines)] == lines:
        yield
        return
    before = linecache.cache.get(name)
    padded = ["\n"] * start + lines
    linecache.cache[name] = (sum(map(len, padded)), None, padded, name)
    try:
        yield
    finally:
        if before is None:
            linecache.cache.pop(name, None)
        else:
            linecache.cache[name] = before
