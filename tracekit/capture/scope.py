"""Which names of a function are global although its frame has a variable of that name."""

from __future__ import annotations

import ast
import symtable
import sys
from typing import TYPE_CHECKING

from tracekit.capture.locate import quiet_compiler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tracekit.capture.locate import Place

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp)


def global_names(place: Place, names: Iterable[str]) -> set[str]:
    """Those of `names` that mean a global in the function around the block.

    From 3.12 on comprehensions are compiled into their function, so a frame has variables that
    only its comprehensions mean: in `[i for i in x]; print(i)` the second `i` is global.
    """
    function = place.enclosing[-1] if place.enclosing else None
    if sys.version_info < (3, 12) or function is None or not _has_comprehension(function):
        return set()
    table: symtable.SymbolTable | None
    with quiet_compiler():
        table = symtable.symtable(place.source.text, place.source.filename, "exec")
    for node in place.enclosing:
        table = _child(table, node) if table is not None else None
    return {name for name in names if table is not None and _is_global(table, name)}


def _has_comprehension(function: ast.AST) -> bool:
    return any(isinstance(node, _COMPREHENSIONS) for node in ast.walk(function))


def _child(table: symtable.SymbolTable, node: ast.AST) -> symtable.SymbolTable | None:
    """The table of a class or function in `table`; type parameters have one between the two."""
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    for child in table.get_children():
        if child.get_lineno() == node.lineno and child.get_name() == node.name:
            return _child(child, node) or child
    return None


def _is_global(table: symtable.SymbolTable, name: str) -> bool:
    try:
        return table.lookup(name).is_global()
    except KeyError:
        return False
