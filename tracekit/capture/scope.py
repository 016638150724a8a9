"""Which variables of a frame are its function's own, and not those of a comprehension."""

from __future__ import annotations

import ast
import copy
import sys
from types import CodeType
from typing import TYPE_CHECKING, cast, final

from tracekit.capture.locate import quiet_compiler

if TYPE_CHECKING:
    from tracekit.capture.locate import Place
    from tracekit.capture.variables import FrameNames

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)


def own_names(place: Place, names: FrameNames) -> frozenset[str]:
    """The frame's names that mean its variables in the function around the block.

    From 3.12 on comprehensions are compiled into their function, so its frame has variables that
    only its comprehensions mean: in `[i for i in x]; print(i)` the second `i` may be global. So the
    function is compiled again with generators in their place, which have frames of their own.
    """
    outermost = place.enclosing[0] if place.enclosing else None
    if sys.version_info < (3, 12) or outermost is None or not _has_comprehension(outermost):
        return names.all
    statement = _Separated().visit(copy.deepcopy(outermost))
    tree = ast.fix_missing_locations(ast.Module([cast("ast.stmt", statement)], []))
    with quiet_compiler():
        code = compile(tree, place.source.filename, "exec", names.future_flags, dont_inherit=True)
    for node in place.enclosing:
        code = _code_of(node, code) or code
    return names.all & {*code.co_varnames, *code.co_cellvars, *code.co_freevars}


def _has_comprehension(function: ast.AST) -> bool:
    return any(isinstance(node, _COMPREHENSIONS) for node in ast.walk(function))


def _code_of(node: ast.AST, code: CodeType) -> CodeType | None:
    """The code object of a class or function in `code`, or in the type parameters around it."""
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            is_it = (constant.co_name, constant.co_firstlineno) == (node.name, line)
            found = constant if is_it else None
            if constant.co_name.startswith("<generic parameters"):
                found = _code_of(node, constant)
            if found is not None:
                return found
    return None


@final
class _Separated(ast.NodeTransformer):
    """`[x for x in y]` becomes `list(x for x in y)`; only compiled, never run."""

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.AST:
        self.generic_visit(node)
        return self._generator(node, node.elt, node.generators)

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return self.visit_ListComp(node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.AST:
        self.generic_visit(node)
        pair = ast.Tuple([node.key, node.value], ast.Load())
        return self._generator(node, pair, node.generators)

    def _generator(
        self, node: ast.expr, element: ast.expr, generators: list[ast.comprehension]
    ) -> ast.AST:
        call = ast.Call(ast.Name("list", ast.Load()), [ast.GeneratorExp(element, generators)], [])
        return ast.copy_location(call, node)
