"""Whether an edit wrote over an earlier one, or went on from what that had written."""

# Values do not tell: a zero to which something is added looks like something that was written. So
# the line is read: `x += 1` goes on, `x[:] = 1` does not. Where that can't be told either, as of a
# function, or of a name that was bound before, nobody is accused.

from __future__ import annotations

import ast
import linecache

from tracekit.core.site import Line
from tracekit.tracing.touches import Touch


def writes_over(touch: Touch, earlier: Touch) -> bool:
    """Whether what an edit wrote certainly does not depend on what an earlier one had left."""
    if touch.origin is not None:
        return touch.origin.writes
    if touch.kind == "skip":
        return True
    statement = _statement(touch.line)
    if not isinstance(statement, ast.Assign):
        return False
    target = statement.targets[0]
    if touch.kind == "in place":
        return isinstance(target, ast.Subscript) and not _is_in(target.value, statement.value)
    before = len(earlier.read_at) if touch.invoke == earlier.invoke else 0
    has_read = any(line != touch.line for line in touch.read_at[before:])
    return not has_read and not _is_in(target, statement.value)


def told_by(touch: Touch) -> str:
    """Where an edit stands, in few words."""
    return touch.origin.what if touch.origin is not None else str(touch.line)


def _is_in(target: ast.expr, value: ast.expr) -> bool:
    """Whether the value that is written to is read in what is written."""
    own = ast.unparse(target)
    return any(isinstance(node, ast.expr) and ast.unparse(node) == own for node in ast.walk(value))


def _statement(line: Line | str) -> ast.stmt | None:
    """The innermost statement at a line of a user's file; None if it can't be found."""
    if not isinstance(line, Line):
        return None
    try:
        tree = ast.parse("".join(linecache.getlines(line.file)))
    except (SyntaxError, ValueError):
        return None
    found: ast.stmt | None = None
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        is_there = node.lineno <= line.number <= (node.end_lineno or 0)
        if is_there and (found is None or node.lineno >= found.lineno):
            found = node
    return found
