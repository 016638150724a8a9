"""Which names the blocks of one trace may read from each other, and where a block reads them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, TypeAlias, cast, final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracekit.capture.locate import Place

_Comprehension: TypeAlias = "ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def bound_by_siblings(place: Place) -> frozenset[str]:
    """The names that some `with` in the file binds: functions may share their variables."""
    names: set[str] = set()
    for node in ast.walk(place.source.tree):
        if isinstance(node, ast.With):
            for inner in node.body:
                names.update(_bound(inner))
    return frozenset(names)


def waiting_for(names: frozenset[str], helper: str, statements: list[ast.stmt]) -> list[ast.stmt]:
    """`statements`, calling `helper(name)` before each read of one of these names."""
    waits = _Waits(names, helper)
    return [waits.statement(statement) for statement in statements]


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `scope` that belong to it, and to no function or class in it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, _SCOPES):
            yield from _own_nodes(child)


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that running `node` may bind."""
    for each in (node, *_own_nodes(node)):
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            yield each.id
        elif isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield each.name
        elif isinstance(each, ast.alias):
            yield (each.asname or each.name).partition(".")[0]
        elif isinstance(each, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and each.name:
            yield each.name
        elif isinstance(each, ast.MatchMapping) and each.rest:
            yield each.rest


@final
class _Waits(ast.NodeTransformer):
    """Puts `helper('name')` before each read of a name; it answers True."""

    def __init__(self, names: frozenset[str], helper: str) -> None:
        self._names = names
        self._helper = helper

    def statement(self, node: ast.stmt) -> ast.stmt:
        return cast("ast.stmt", self.visit(node))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self._names or not isinstance(node.ctx, ast.Load):
            return node
        choice = ast.IfExp(self._wait(node.id, node), node, node)
        return ast.copy_location(choice, node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        return self._behind_waits([node.target], node)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        self.generic_visit(node)
        return self._behind_waits(node.targets, node)

    def _behind_waits(self, targets: list[ast.expr], node: ast.stmt) -> ast.AST:
        names = [each.id for each in targets if isinstance(each, ast.Name)]
        waits: list[ast.stmt] = [
            ast.copy_location(ast.Expr(self._wait(name, node)), node)
            for name in names
            if name in self._names
        ]
        if not waits:
            return node
        return ast.copy_location(ast.If(ast.Constant(True), [*waits, node], []), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._inner(node, node.args, ("args", "decorator_list", "returns"))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._inner(node, node.args, ("args", "decorator_list", "returns"))

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._inner(node, node.args, ("args",))

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        return self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        return self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        return self._comprehension(node)

    def _comprehension(self, node: _Comprehension) -> ast.AST:
        """What the first `for` goes through is evaluated outside."""
        first = node.generators[0]
        outside, first.iter = self.visit(first.iter), ast.copy_location(ast.Constant(None), node)
        self._inner(node, None, ())
        first.iter = outside
        return node

    def _inner(
        self, node: ast.AST, arguments: ast.arguments | None, outside: tuple[str, ...]
    ) -> ast.AST:
        """A scope of its own may mean something else by a name; its fields `outside` do not."""
        own = {name for child in ast.iter_child_nodes(node) for name in _bound(child)}
        if arguments is not None:
            own |= {
                argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)
            }
        elsewhere = {
            name
            for child in ast.walk(node)
            if isinstance(child, (ast.Global, ast.Nonlocal))
            for name in child.names
        }
        within = _Waits(self._names - (own - elsewhere), self._helper)
        for field, value in ast.iter_fields(node):
            visitor = self if field in outside else within
            if isinstance(value, ast.AST):
                setattr(node, field, visitor.visit(value))
            elif isinstance(value, list):
                children = cast("list[ast.AST]", value)
                setattr(node, field, [visitor.visit(child) for child in children])
        return node

    def _wait(self, name: str, at: ast.AST) -> ast.Call:
        function = ast.Name(self._helper, ast.Load())
        call = ast.Call(function, [ast.Constant(name)], [])
        for node in (call, function, call.args[0]):
            ast.copy_location(node, at)
        return call
