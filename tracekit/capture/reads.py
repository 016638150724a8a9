"""Which names some statements may read before they bind them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOOKS_AROUND = frozenset({"locals", "vars", "dir", "eval", "exec", "globals", "super"})


@final
class _Everything(frozenset[str]):
    """Contains every name: for code that can look up names which it does not spell out."""

    def __contains__(self, _: object) -> bool:
        return True


def names_read(statements: Iterable[ast.stmt]) -> frozenset[str]:
    """The names that may be read before the statements bind them, and perhaps some more."""
    reader = _Reader()
    for statement in statements:
        reader.visit(statement)
    return _Everything() if reader.read & _LOOKS_AROUND else frozenset(reader.read)


class _Reader(ast.NodeVisitor):
    """Goes through statements in the order in which they run.

    What a loop, a branch or a handler binds counts as bound within it alone, as it may not run;
    what a function defined here reads counts as read where the function is defined.
    """

    def __init__(self, bound: Iterable[str] = ()) -> None:
        self.read: set[str] = set()
        self._bound = set(bound)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self._bound.add(node.id)
        elif node.id not in self._bound:
            self.read.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit_all([node.value, *node.targets])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._visit_all([node.value, node.target])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit_Name(ast.Name(node.target.id, ast.Load()))
        self._visit_all([node.value, node.target])

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._apart([node.target, *node.body])
        self._apart(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._apart(node.body)
        self._apart(node.orelse)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._bound |= self._apart(node.body) & self._apart(node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        self._apart([*node.body, *node.orelse])
        for handler in node.handlers:
            self._apart([handler])
        self._visit_all(node.finalbody)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.visit(node.type)
        self._bound |= {node.name} if node.name else set()
        self._visit_all(node.body)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        for case in node.cases:
            self._apart([case])

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self._bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._bound.add(node.name)
        self._visit_all(node.decorator_list)
        annotations = [each.annotation for each in ast.walk(node.args) if isinstance(each, ast.arg)]
        self._visit_all([each for each in (*annotations, node.returns) if each is not None])
        self._function(node.args, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node.args, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_all([*node.decorator_list, *node.bases, *node.keywords])
        self._apart(node.body)
        self._bound.add(node.name)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self._comprehension(node.generators, [node.elt])

    visit_SetComp = visit_GeneratorExp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node.generators, [node.key, node.value])

    def _comprehension(self, generators: list[ast.comprehension], elements: list[ast.expr]) -> None:
        parts: list[ast.AST] = []
        for generator in generators:
            parts += [generator.iter, generator.target, *generator.ifs]
        self._apart([*parts, *elements])

    def _function(self, arguments: ast.arguments, body: Iterable[ast.AST]) -> None:
        defaults = [*arguments.defaults, *arguments.kw_defaults]
        self._visit_all([default for default in defaults if default is not None])
        names = [node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)]
        self._apart(body, names)

    def _apart(self, nodes: Iterable[ast.AST], bound: Iterable[str] = ()) -> set[str]:
        """Visit what may not run; the names that are bound if it does."""
        inside = _Reader([*self._bound, *bound])
        inside._visit_all(nodes)
        self.read |= inside.read
        return inside._bound

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)
