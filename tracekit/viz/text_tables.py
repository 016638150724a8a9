"""Tables, facts, verdicts and trees as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from tracekit.viz.parts import Branch, Facts, Item, Table, Tree, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text

_STYLES: Final = {"good": "green", "bad": "bold red", "note": "yellow"}
_INDENT: Final = 2  # characters for each floor of a tree


def facts_text(part: Facts) -> RenderableType:
    """Names and what is known of each."""
    table = _columns([("", "left"), ("", "left")], has_head=False)
    for name, value in part.facts:
        table.add_row(_text(name, "dim"), _text(value))
    return table


def verdict_text(part: Verdict) -> RenderableType:
    """The sentence."""
    return _text(part.text, _STYLES.get(part.mood, ""))


def table_text(part: Table) -> Iterator[RenderableType]:
    """Rows under headings."""
    if part.title:
        yield _text(part.title, "bold")
    table = _columns([(name, _side(part, place)) for place, name in enumerate(part.columns)])
    for row in part.rows:
        table.add_row(*map(_item, row))
    yield table


def tree_text(part: Tree) -> RenderableType:
    """Each branch on a line, below and to the right of what it is of."""
    table = _columns([("module", "left"), *((name, "right") for name in part.columns)])
    for root in part.roots:
        _add(table, root, 0)
    return table


def _add(table: RichTable, branch: Branch, depth: int) -> None:
    kind = f" {branch.kind}" if branch.kind else ""
    name = _text(" " * _INDENT * depth + branch.name).append(kind, "dim")
    table.add_row(name, *map(_item, branch.items))
    for each in branch.below:
        _add(table, each, depth + 1)


def _columns(columns: list[tuple[str, str]], has_head: bool = True) -> RichTable:
    from rich.table import Table as RichTable

    table = RichTable(box=None, show_header=has_head, pad_edge=False, header_style="dim")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _side(part: Table, place: int) -> str:
    is_number = all(row[place].mood == "number" for row in part.rows)
    return "right" if is_number and part.rows else "left"


def _item(item: Item) -> Text:
    return _text(item.text, _STYLES.get(item.mood, ""))


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style)
