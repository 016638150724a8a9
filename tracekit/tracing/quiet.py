"""Blocks that ask the model for nothing: they hold caches alone, so they need no worker."""

from __future__ import annotations

import ast
from functools import lru_cache

from tracekit.capture import Block

# What may be called in the arguments of a quiet block: functions that ask no model for anything.
_HARMLESS = frozenset({"range", "list", "tuple", "len", "enumerate", "zip", "reversed", "str"})
_VALUES = frozenset({"output", "input", "inputs", "hidden", "result", "next", "skip", "calls"})


@lru_cache(maxsize=256)
def asks_for_nothing(block: Block) -> bool:
    """Whether the block only makes caches; said of a block only if it is certain."""
    if block.is_empty:
        return True
    if block.target is None:
        return False
    return all(_makes_a_cache(statement, block.target) for statement in block.tree.body)


def _makes_a_cache(statement: ast.stmt, tracer: str) -> bool:
    if isinstance(statement, ast.Pass):
        return True
    if isinstance(statement, ast.Assign):
        if not all(isinstance(target, ast.Name) for target in statement.targets):
            return False
    elif not isinstance(statement, ast.Expr):
        return False
    call = statement.value
    if not isinstance(call, ast.Call) or not _is_cache_of(call.func, tracer):
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    return all(_is_harmless(node) for argument in arguments for node in ast.walk(argument))


def _is_cache_of(function: ast.expr, tracer: str) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "cache"
        and isinstance(function.value, ast.Name)
        and function.value.id == tracer
    )


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr not in _VALUES
    if isinstance(node, ast.Call):
        function = node.func
        return (isinstance(function, ast.Name) and function.id in _HARMLESS) or (
            isinstance(function, ast.Attribute) and function.attr in {"device", "format"}
        )
    return not isinstance(node, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom))
