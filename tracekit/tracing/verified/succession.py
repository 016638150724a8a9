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
    if touch.author is not None:
        return touch.author.writes
    if touch.kind == "skip":
        return True
    statement = _statement(touch.line)
    if not isinstance(statement, ast.Assign):
        return False
    kept = _names(statement.value) & _holders(earlier)
    if any(not _is_bound_anew(name, earlier, touch) for name in kept):
        return False
    target = statement.targets[0]
    if touch.kind == "in place":
        return isinstance(target, ast.Subscript) and not _is_in(target.value, statement.value)
    before = len(earlier.read_at) if touch.invoke == earlier.invoke else 0
    has_read = any(line != touch.line for line in touch.read_at[before:])
    return not has_read and not _is_in(target, statement.value)


def _holders(touch: Touch) -> set[str]:
    """The names that have what an edit had left: `h` of `h = layer.output`, behind `h += 1`."""
    statement = _statement(touch.line)
    if not isinstance(statement, ast.Assign):
        return set()
    if touch.kind == "in place":
        return {name for target in statement.targets for name in _bound(target)}
    return {statement.value.id} if isinstance(statement.value, ast.Name) else set()


def _is_bound_anew(name: str, earlier: Touch, touch: Touch) -> bool:
    """Whether a name certainly has something else at a later edit, by what is assigned between.

    Between two turns of a loop is all that is in the loop.
    """
    one, other = earlier.line, touch.line
    if not isinstance(one, Line) or not isinstance(other, Line) or one.file != other.file:
        return False
    first, last = one.number, other.number
    statements = _statements(one.file)
    if first >= last:
        loops = [
            each
            for each in statements
            if isinstance(each, ast.For | ast.While) and _is_at(each, first) and _is_at(each, last)
        ]
        if not loops:
            return False
        first, last = loops[-1].lineno, loops[-1].end_lineno or 0
    written = _statement(other)
    targets = written.targets if isinstance(written, ast.Assign) else []
    return any(
        isinstance(each, ast.Assign)
        and first < each.lineno <= last
        and _runs_with(each, other, statements)
        and any(isinstance(it, ast.Name) and it.id == name for it in each.targets)
        and name not in _names(each.value)
        and not any(_is_in(target, each.value) for target in targets)
        for each in statements
    )


def _runs_with(statement: ast.stmt, line: Line, statements: list[ast.stmt]) -> bool:
    """Whether nothing that may not run has a statement in it, and not the line."""
    return not any(
        isinstance(each, ast.If | ast.For | ast.While | ast.Try)
        and _is_at(each, statement.lineno)
        and not _is_at(each, line.number)
        for each in statements
    )


def _bound(target: ast.expr) -> set[str]:
    """The names that an assignment to this gives to values."""
    return {
        node.id
        for node in ast.walk(target)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def _names(value: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(value) if isinstance(node, ast.Name)}


def told_by(touch: Touch) -> str:
    """Where an edit stands, in few words."""
    return touch.author.what if touch.author is not None else str(touch.line)


def _is_in(target: ast.expr, value: ast.expr) -> bool:
    """Whether the value that is written to is read in what is written."""
    own = ast.unparse(target)
    return any(isinstance(node, ast.expr) and ast.unparse(node) == own for node in ast.walk(value))


def _statement(line: Line | str) -> ast.stmt | None:
    """The innermost statement at a line of a user's file; None if it can't be found."""
    if not isinstance(line, Line):
        return None
    here = [each for each in _statements(line.file) if _is_at(each, line.number)]
    return here[-1] if here else None


def _statements(file: str) -> list[ast.stmt]:
    """All statements of a file, what is in one behind it; none, where its source is not there."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return sorted(found, key=lambda each: (each.lineno, -(each.end_lineno or 0)))


def _is_at(statement: ast.stmt, number: int) -> bool:
    return statement.lineno <= number <= (statement.end_lineno or 0)
