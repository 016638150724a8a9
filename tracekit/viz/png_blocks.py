"""What a PNG is put together from; all sizes are in inches, and y goes downward."""

from __future__ import annotations

from typing import Any, Final, Protocol, final

from tracekit.viz.colours import STEPS, palette, text_on
from tracekit.viz.parts import Flow, Grid, Grids, Scale
from tracekit.viz.wording import brief

MARGIN: Final = 0.2
_INK: Final = "#1b1f24"
_SOFT: Final = "#57606a"
_NONE: Final = "#dddddd"  # of a cell that has no number
_CELL: Final = 0.27  # height of a cell with a number in it
_DOT: Final = 0.14  # and of one without, at most
_PATTERN: Final = 3.5  # inches of a side that has many of those
_LETTER: Final = 0.078  # width of a letter of SIZE points, monospaced
_LINE: Final = 0.17
_SIZE: Final = 9.0
_SMALL: Final = 8.0
_SPOKEN: Final = 1200  # cells of a grid at most that have their number in them
_FLOW: Final = 8.0  # width of running text


class Block(Protocol):
    """Something of a known size that can be drawn."""

    @property
    def width(self) -> float: ...
    @property
    def height(self) -> float: ...
    def draw(self, axes: Any, left: float, top: float) -> None: ...


@final
class Words:
    """Lines of text, monospaced unless it is a heading."""

    def __init__(self, text: str, is_heading: bool = False) -> None:
        self._lines = text.splitlines() or [""]
        self._is_heading = is_heading
        self.width = max(map(len, self._lines)) * _LETTER * (1.25 if is_heading else 1.0)
        self.height = len(self._lines) * _LINE

    def draw(self, axes: Any, left: float, top: float) -> None:
        """Line by line, so that each is where it was counted."""
        if self._is_heading:
            style = dict(weight="bold", fontsize=_SIZE + 2)
        else:
            style = dict(family="monospace", fontsize=_SIZE)
        for number, line in enumerate(self._lines):
            write(axes, left, top + number * _LINE, line, va="top", **style)


@final
class Legend:
    """The colours of a scale, with numbers."""

    width = 3.0
    height = 0.32

    def __init__(self, scale: Scale) -> None:
        self._scale = scale

    def draw(self, axes: Any, left: float, top: float) -> None:
        """A bar with its ends and its middle."""
        step = (self.width - 0.4) / STEPS
        for place, colour in enumerate(palette(self._scale.kind)):
            _fill(axes, left + place * step, top, step * 1.02, 0.12, colour)
        for tick, share, side in zip(
            self._scale.ticks, (0, 0.5, 1), ("left", "center", "right"), strict=True
        ):
            x = left + share * STEPS * step
            write(axes, x, top + 0.16, brief(tick), va="top", ha=side, color=_SOFT, fontsize=_SMALL)


@final
class GridRow:
    """Some grids of one scale, side by side."""

    def __init__(self, part: Grids, grids: tuple[Grid, ...]) -> None:
        self.grids = grids
        self._part = part
        self._drawn = [_GridBlock(part, grid) for grid in grids]
        self.width = sum(one.width for one in self._drawn) + MARGIN * (len(grids) - 1)
        self.height = max(one.height for one in self._drawn)

    def draw(self, axes: Any, left: float, top: float) -> None:
        """From left to right."""
        for one in self._drawn:
            one.draw(axes, left, top)
            left += one.width + MARGIN


@final
class _GridBlock:
    """One grid: its title, the labels of its columns upright if they are long, and its cells."""

    def __init__(self, part: Grids, grid: Grid) -> None:
        self._part, self._grid = part, grid
        rows, columns = grid.numbers.shape
        self._is_spoken = not part.is_pattern and rows * columns <= _SPOKEN
        self._texts = (
            [[part.text(grid, row, column) for column in range(columns)] for row in range(rows)]
            if self._is_spoken
            else []
        )
        heads = [len(label) for label in grid.columns.shown]
        longest = max((len(text) for row in self._texts for text in row), default=0)
        self._is_upright = not self._is_spoken or max(heads) > max(longest, 8)
        letters = longest if self._is_upright else max(longest, *heads)
        dot = min(_DOT, _PATTERN / max(rows, columns))
        self._is_labelled = self._is_spoken or dot > 0.8 * _DOT
        self._cell = (letters + 1.5) * _LETTER if self._is_spoken else dot
        self._line = _CELL if self._is_spoken else dot
        self._label = (max(map(len, (*grid.rows.shown, grid.rows.name))) + 1) * _LETTER
        self._head = (max(heads) * _LETTER if self._is_upright else _LINE) + 0.06
        if not self._is_labelled:
            self._label, self._head = 0.0, 0.02
        self._title = 1.3 * _LINE if grid.title else 0.0
        self.width = max(self._label + columns * self._cell, len(grid.title) * _LETTER)
        self.height = self._title + self._head + rows * self._line

    def draw(self, axes: Any, left: float, top: float) -> None:
        """Title, labels, cells."""
        grid = self._grid
        if grid.title:
            write(axes, left, top, grid.title, va="top", weight="bold", fontsize=_SIZE)
        start, first = left + self._label, top + self._title + self._head
        self._cells(axes, start, first)
        if not self._is_labelled:
            return
        style = dict(color=_SOFT, fontsize=_SMALL if self._is_spoken else _SMALL - 1.5)
        turn = dict(rotation=90, va="bottom") if self._is_upright else dict(va="bottom")
        write(axes, start - 0.06, first - 0.05, grid.rows.name, ha="right", va="bottom", **style)
        for column, label in enumerate(grid.columns.shown):
            x = start + (column + 0.5) * self._cell
            write(axes, x, first - 0.05, label, ha="center", **turn, **style)
        for row, label in enumerate(grid.rows.shown):
            y = first + (row + 0.5) * self._line
            write(axes, start - 0.06, y, label, ha="right", va="center", **style)

    def _cells(self, axes: Any, left: float, top: float) -> None:
        from matplotlib.colors import to_rgb

        numbers, scale = self._grid.numbers, self._part.scale
        colours = palette(scale.kind)
        levels = [[scale.level(value) for value in row] for row in numbers.tolist()]
        image = [[to_rgb(_NONE if at is None else colours[at]) for at in row] for row in levels]
        rows, columns = numbers.shape
        extent = (left, left + columns * self._cell, top + rows * self._line, top)
        axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
        for row, texts in enumerate(self._texts):
            for column, text in enumerate(texts):
                level = levels[row][column]
                ink = _INK if level is None else text_on(colours[level])
                x, y = left + (column + 0.5) * self._cell, top + (row + 0.5) * self._line
                write(axes, x, y, text, ha="center", va="center", color=ink, fontsize=_SMALL)


@final
class FlowBlock:
    """Running text, token by token, each on its colour."""

    def __init__(self, part: Flow) -> None:
        self._part = part
        self._places: list[tuple[float, float, float]] = []  # left, top, width
        x = y = 0.0
        for label, shown in zip(part.tokens.labels, part.tokens.shown, strict=True):
            size = (len(shown) + 1) * _LETTER
            if x and x + size > _FLOW:
                x, y = 0.0, y + 1.8 * _LINE
            self._places.append((x, y, size))
            x, y = (0.0, y + 1.8 * _LINE) if "\n" in label else (x + size + 0.03, y)
        self.width = max(left + size for left, _, size in self._places)
        self.height = self._places[-1][1] + 1.5 * _LINE

    def draw(self, axes: Any, left: float, top: float) -> None:
        """A box and a word for each token."""
        colours = palette(self._part.scale.kind)
        style = dict(family="monospace", fontsize=_SIZE, ha="center", va="center")
        for place, (x, y, size) in enumerate(self._places):
            level = self._part.scale.level(float(self._part.numbers[place]))
            colour = _NONE if level is None else colours[level]
            _fill(axes, left + x, top + y, size, 1.4 * _LINE, colour)
            middle = (left + x + size / 2, top + y + 0.7 * _LINE)
            write(axes, *middle, self._part.tokens.shown[place], color=text_on(colour), **style)


def write(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text as it is: a dollar sign begins no formula."""
    axes.text(x, y, text, parse_math=False, **{"color": _INK, **style})


def _fill(axes: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.fill([x, x + width, x + width, x], [y, y, y + height, y + height], colour, linewidth=0)
