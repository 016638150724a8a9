"""Which names the blocks of one trace may read from each other, and where a block reads them."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, cast, final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracekit.capture.locate import Place

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def bound_by_siblings(place: Place) -> frozenset[str]:
    """The names that some `with` in the function (or module) around the block binds."""
    functions = [node for node in place.enclosing if isinstance(node, _FUNCTIONS)]
    scope = functions[-1] if functions else place.source.tree
    names: set[str] = set()
    for node in _own_nodes(scope):
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
        elif isinstance(each, ast.ExceptHandler) and each.name:
            yield each.name


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
        if not isinstance(node.target, ast.Name) or node.target.id not in self._names:
            return node
        wait = ast.copy_location(ast.Expr(self._wait(node.target.id, node)), node)
        return ast.copy_location(ast.If(ast.Constant(True), [wait, node], []), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._inner(node, node.args)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._inner(node, node.args)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._inner(node, node.args)

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        return self._inner(node, None)

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return self._inner(node, None)

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        return self._inner(node, None)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.AST:
        return self._inner(node, None)

    def _inner(self, node: ast.AST, arguments: ast.arguments | None) -> ast.AST:
        """A scope of its own may mean something else by a name."""
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
        return _Waits(self._names - (own - elsewhere), self._helper).generic_visit(node)

    def _wait(self, name: str, at: ast.AST) -> ast.Call:
        function = ast.Name(self._helper, ast.Load())
        call = ast.Call(function, [ast.Constant(name)], [])
        for node in (call, function, call.args[0]):
            ast.copy_location(node, at)
        return call
