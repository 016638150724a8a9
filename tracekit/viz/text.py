"""A picture as text for a terminal, by rich: the same numbers, in colour where a terminal is."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from tracekit.viz.parts import Facts, Flow, Grids, Part, Table, Tree, Verdict
from tracekit.viz.text_grids import flow_text, grids_text
from tracekit.viz.text_tables import facts_text, table_text, tree_text, verdict_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH: Final = 100  # characters of a line, where there is no terminal
_TABLE: Final = 400  # and of one of a table, whose words are not to be broken


def plain(title: str, parts: Sequence[Part], width: int = WIDTH) -> str:
    """The picture without colours."""
    file = io.StringIO()
    console = _console(file, width=width, color_system=None)
    return _printed(console, file, title, parts, _TABLE)


def for_terminal(title: str, parts: Sequence[Part]) -> str:
    """The picture in colours if standard output is a terminal, else without."""
    from rich.console import Console

    here = Console(file=sys.stdout)
    if here.is_jupyter:  # the colours are those of the HTML, beside which this is stored
        return plain(title, parts)
    if not here.is_terminal or here.no_color:
        return plain(title, parts, here.width if here.is_terminal else WIDTH)
    file = io.StringIO()
    console = _console(file, width=here.width, force_terminal=True)
    return _printed(console, file, title, parts)


def renderables(title: str, parts: Sequence[Part], width: int) -> Iterator[RenderableType]:
    """What rich is to print, one below the other."""
    from rich.text import Text

    if title:
        yield Text(title, "bold")
    for part in parts:
        yield from _part(part, width)


def _console(file: io.StringIO, **options: Any) -> Console:
    """One that prints to `file` and nowhere else, in a notebook too."""
    from rich.console import Console

    return Console(file=file, highlight=False, emoji=False, force_jupyter=False, **options)


def _printed(
    console: Console, file: io.StringIO, title: str, parts: Sequence[Part], table: int = 0
) -> str:
    head = [[]] if title else []
    for part in [*head, *([part] for part in parts)]:
        for piece in renderables("" if part else title, part, console.width):
            is_table = bool(part) and isinstance(part[0], Table | Tree)
            console.width, usual = table if is_table and table else console.width, console.width
            console.print(piece)
            console.width = usual
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _part(part: Part, width: int) -> Iterator[RenderableType]:
    match part:
        case Grids():
            yield from grids_text(part, width)
        case Flow():
            yield from flow_text(part)
        case Facts():
            yield facts_text(part)
        case Verdict():
            yield verdict_text(part)
        case Table():
            yield from table_text(part)
        case Tree():
            yield tree_text(part)
