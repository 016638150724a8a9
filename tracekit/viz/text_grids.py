"""Heat maps and tokens as text: numbers under labels, as many columns at a time as fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from tracekit.viz.colours import palette, text_on
from tracekit.viz.parts import Flow, Grid, Grids, Scale
from tracekit.viz.wording import brief, short

if TYPE_CHECKING:
    from rich.text import Text

_LABEL: Final = 16  # characters of a label of a row at most
_CELL: Final = 10  # and of a cell
_NUMBER: Final = 6  # and of the number behind a text in it
_GAP: Final = 1  # between cells
_PATTERN: Final = 24  # columns; of larger patterns the strongest are told
_MOST: Final = 10  # of them


def grids_text(part: Grids, width: int) -> Iterator[Text]:
    """All grids, one below the other, and what the colours mean."""
    yield _legend(part.scale)
    for grid in part.grids:
        is_wide = part.is_pattern and len(grid.columns.labels) > _PATTERN
        yield from _strongest(grid) if is_wide else _grid(part, grid, width)


def flow_text(part: Flow) -> Iterator[Text]:
    """Each token with its number behind it; in colour, the number is its background."""
    from rich.text import Text

    yield _legend(part.scale)
    line = Text()
    for place, label in enumerate(part.tokens.shown):
        value = float(part.numbers[place])
        line.append(f"{label} {brief(value)}", _style(part.scale, value)).append("  ")
        if "\n" in part.tokens.labels[place]:
            line.append("\n")
    yield line


def _legend(scale: Scale) -> Text:
    from rich.text import Text

    low, _, high = map(brief, scale.ticks)
    line = Text(f"{scale.what}: " if scale.what else "", "dim").append(f"{low} ")
    for colour in palette(scale.kind)[::4]:
        line.append("-", f"{colour} on {colour}")
    return line.append(f" {high}")


def _grid(part: Grids, grid: Grid, width: int) -> Iterator[Text]:
    from rich.text import Text

    texts = _texts(part, grid)
    rows = [grid.rows.name, *grid.rows.shown]
    first = min(max(map(_width, rows)), _LABEL)
    heads = grid.columns.shown
    cells = [cell for row in texts for cell in row]
    most = _CELL if grid.texts is None else _CELL + _NUMBER
    size = min(max(map(_width, [*heads, *cells]), default=1), most) + _GAP
    fits = max(1, (width - first) // size)
    if grid.title:
        yield Text(grid.title, "bold")
    for start in range(0, len(heads), fits):
        shown = range(start, min(start + fits, len(heads)))
        line = Text(_cut(grid.rows.name, first))
        for column in shown:
            line.append(_cut(heads[column], size - _GAP, size))
        yield line
        for row, label in enumerate(grid.rows.shown):
            line = Text(_cut(label, first))
            for column in shown:
                style = _style(part.scale, float(grid.numbers[row, column]))
                line.append(" " * _GAP).append(
                    _cut(texts[row][column], size - _GAP, size - _GAP), style
                )
            yield line


def _strongest(grid: Grid) -> Iterator[Text]:
    """The largest numbers of a pattern that is too large to be written out."""
    from rich.text import Text

    numbers = grid.numbers.ravel()
    places = (-np.nan_to_num(np.abs(numbers), nan=-1.0)).argsort(kind="stable")[:_MOST]
    yield Text(f"{grid.title}: the {len(places)} strongest of {numbers.size}", "bold")
    for place in places.tolist():
        row, column = divmod(place, len(grid.columns.labels))
        yield Text(f"  {grid.tip(row, column)}")


def _texts(part: Grids, grid: Grid) -> list[list[str]]:
    rows, columns = range(grid.numbers.shape[0]), range(grid.numbers.shape[1])
    if grid.texts is not None:
        return [[_spoken(part, grid, row, column) for column in columns] for row in rows]
    decimals = part.decimals
    return [
        [short(float(grid.numbers[row, column]), decimals) for column in columns] for row in rows
    ]


def _spoken(part: Grids, grid: Grid, row: int, column: int) -> str:
    """What stands in a cell, and its number, which the colour alone does not tell."""
    value = float(grid.numbers[row, column])
    number = "" if math.isnan(value) else f" {short(value, 2)}"
    return _cut(part.text(grid, row, column), _CELL).rstrip() + number


def _style(scale: Scale, value: float) -> str:
    level = scale.level(value)
    if level is None:
        return "italic"
    colour = palette(scale.kind)[level]
    return f"{text_on(colour)} on {colour}"


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _cut(text: str, size: int, right: int = 0) -> str:
    """A text of at most `size` characters, to the left; or to the right, in so many as `right`."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) > size:
        text = set_cell_size(text, size - 1) + "…"
    space = " " * (max(size, right) - cell_len(text))
    return space + text if right else text + space
