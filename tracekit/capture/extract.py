"""Refuse what cannot be lifted out of its place: what leaves the block or suspends its function."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final, final

from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tracekit.capture.locate import Place

_MOVE: Final = "move it after the block"
_WRAP: Final = "put it into a function that is called in the block"
_NAMING_FIELDS: Final = ("id", "attr", "name", "asname")
_OF_A_CLASS: Final = frozenset({"super", "__class__"})


def check(place: Place) -> None:
    """Raise CaptureError, naming line and construct, unless the body can run elsewhere."""
    filename, statement = place.source.filename, place.statement
    if place.item != len(statement.items) - 1:
        other = ast.unparse(statement.items[place.item + 1].context_expr)
        raise CaptureError(
            f"{filename}:{statement.lineno}: `{other}` stands after the trace in one `with`, "
            "so it would be closed before the block runs; put the trace last"
        )
    checker = _Checker(filename)
    for inner in statement.body:
        checker.visit(inner)


def check_namespace(place: Place, around: frozenset[str]) -> None:
    """Refuse, in the body of a class, names that only code compiled inside that class can mean.

    These are private names, zero-argument `super` and the names `around` it (of a function).
    """
    is_in_class = any(isinstance(node, ast.ClassDef) for node in place.enclosing)
    for node in (inner for statement in place.statement.body for inner in ast.walk(statement)):
        for name in {getattr(node, field, None) for field in _NAMING_FIELDS} - {None}:
            is_bound_to_class = is_in_class and (name in _OF_A_CLASS or _is_private(str(name)))
            if name in around or is_bound_to_class:
                raise CaptureError(
                    f"{place.source.filename}:{getattr(node, 'lineno', place.statement.lineno)}: "
                    f"a block in the body of a class cannot use `{name}`; move it out of the class"
                )


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def is_empty(body: Iterable[ast.stmt]) -> bool:
    """Does the body do nothing (`pass`, a string, `...`)?"""
    return all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


@final
class _Checker(ast.NodeVisitor):
    """Visits what belongs to the block itself, not the functions and classes defined in it."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._is_in_loop = False
        self._is_in_handler = False

    def _refuse(self, node: ast.stmt | ast.expr, construct: str, way_out: str) -> None:
        raise CaptureError(
            f"{self._filename}:{node.lineno}: `{construct}` cannot be lifted out of the block; "
            f"{way_out}"
        )

    def visit_Return(self, node: ast.Return) -> None:
        self._refuse(node, "return", _MOVE)

    def visit_Yield(self, node: ast.Yield) -> None:
        self._refuse(node, "yield", _MOVE)

    def visit_YieldFrom(self, node: ast.YieldFrom) -> None:
        self._refuse(node, "yield from", _MOVE)

    def visit_Await(self, node: ast.Await) -> None:
        self._refuse(node, "await", _MOVE)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._refuse(node, "async for", _MOVE)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        self._refuse(node, "async with", _MOVE)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if any(alias.name == "*" for alias in node.names):
            self._refuse(node, "import *", "move it before the block")

    def visit_Raise(self, node: ast.Raise) -> None:
        """What is being handled around the block is not being handled where the body runs."""
        if node.exc is None and not self._is_in_handler:
            self._refuse(node, "raise", "name the error: `except ... as error`, `raise error`")
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        was_in_handler, self._is_in_handler = self._is_in_handler, True
        self.generic_visit(node)
        self._is_in_handler = was_in_handler

    def visit_Break(self, node: ast.Break) -> None:
        if not self._is_in_loop:
            self._refuse(node, "break", f"the loop is outside; {_MOVE}")

    def visit_Continue(self, node: ast.Continue) -> None:
        if not self._is_in_loop:
            self._refuse(node, "continue", f"the loop is outside; {_MOVE}")

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.target)
        self.visit(node.iter)
        self._visit_loop(node)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._visit_loop(node)

    def _visit_loop(self, node: ast.For | ast.While) -> None:
        was_in_loop, self._is_in_loop = self._is_in_loop, True
        self._visit_all(node.body)
        self._is_in_loop = was_in_loop
        self._visit_all(node.orelse)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit_all(node.decorator_list)
        self._visit_all(node.args.defaults)
        self._visit_all([default for default in node.args.kw_defaults if default is not None])

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_all(node.args.defaults)
        self._visit_all([default for default in node.args.kw_defaults if default is not None])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all(node.decorator_list)
        self._visit_all(node.bases)
        self._visit_all([keyword.value for keyword in node.keywords])

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)  # all else runs in the generator's own frame

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.DictComp) -> None:
        if any(generator.is_async for generator in node.generators):
            self._refuse(node, "async for", _WRAP)
        self.generic_visit(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self.visit_ListComp(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self.visit_ListComp(node)

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)
