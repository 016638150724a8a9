"""What a picture is made of, said once for all that draw it: HTML, text, and matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, final

from tracekit.viz.colours import STEPS, Kind
from tracekit.viz.wording import decimals_of, exact, short, visible

Mood: TypeAlias = Literal["", "good", "bad", "note", "code", "number", "whole"]
# So many cells are elements of their own; more are an image, which is read by pointing at it.
LARGE: Final = 1500
LARGE_PATTERN: Final = 1200
TOKENS: Final = ("position", "token", "query", "key", "from", "to")  # what has tokens as labels


@final
@dataclass(frozen=True)
class Scale:
    """Which colour a number has: the how-manieth of STEPS between `low` and `high`."""

    kind: Kind
    low: float
    high: float
    what: str = ""

    def level(self, value: float) -> int | None:
        """From 0 to STEPS - 1; None for what is no number."""
        if math.isnan(value):
            return None
        width = self.high - self.low
        share = (value - self.low) / width if width > 0 else 0.0
        return round(min(max(share, 0.0), 1.0) * (STEPS - 1))

    @property
    def ticks(self) -> tuple[float, float, float]:
        """The numbers at both ends and in the middle."""
        return self.low, (self.low + self.high) / 2, self.high


def scale_of(
    values: Iterable[float], what: str = "", low: float | None = None, high: float | None = None
) -> Scale:
    """The scale for some numbers: diverging around 0 where some are negative, else sequential.

    A sequential one begins at 0, unless all numbers are far from it. `low` and `high` are kept.
    """
    numbers = [value for value in values if math.isfinite(value)]
    least = min(numbers, default=0.0) if low is None else low
    most = max(numbers, default=1.0) if high is None else high
    if least < 0:
        bound = max(abs(least), abs(most))
        return Scale("diverging", -bound, bound, what)
    if low is None and least < most / 2:
        least = 0.0
    if low is None and high is None and least == most:
        least = min(0.0, least)
    return Scale("sequential", least, most, what)


@final
@dataclass(frozen=True)
class Places:
    """The labels along one side of a grid, and what they count."""

    name: str
    labels: tuple[str, ...]
    first: int = 0  # the number of the first place, where it is not 0
    is_named: bool = True  # whether the name is said with each place

    @property
    def shown(self) -> list[str]:
        """The labels, with nothing invisible in them; nothing for what has no name at all."""
        return [visible(label) if label or self.name else "" for label in self.labels]

    @property
    def is_text(self) -> bool:
        """Whether the labels are tokens, so that the number of a place tells more."""
        return self.name in TOKENS

    def told(self, place: int) -> str:
        """One place in words: "position 3 Tower", "layer 2"."""
        label, number = visible(self.labels[place]), str(place + self.first)
        parts = [self.name] if self.is_named and not label.startswith(self.name) else []
        parts += [number] if self.is_text and label != number else []
        return " ".join(filter(None, [*parts, label if self.labels[place] or self.name else ""]))


@final
@dataclass(frozen=True)
class Grid:
    """A number for each row and column, as colours.

    `texts` is what stands in the cells, where that is not the number; `more` is what else is told
    of a cell; `numbers` is an array, [rows, columns]. `joint` is between row and column in words.
    """

    rows: Places
    columns: Places
    numbers: Any
    title: str = ""
    texts: Sequence[Sequence[str]] | None = None
    more: Callable[[int, int], str] | None = None
    joint: str = ", "
    told: str = ""  # which of several it is

    def tip(self, row: int, column: int) -> str:
        """All of one cell in words, the number with all its digits."""
        place = self.joint.join(filter(None, (self.rows.told(row), self.columns.told(column))))
        value = self.numbers[row, column]
        number = "not a number (nan)" if math.isnan(value) else exact(value)
        text = f"{visible(self.texts[row][column])} " if self.texts is not None else ""
        more = self.more(row, column) if self.more is not None else ""
        which = f"{self.told}, " if self.told else ""
        return f"{which}{place}: {text}{number}" + (f"\n{more}" if more else "")


@final
@dataclass(frozen=True)
class Grids:
    """Grids side by side, of one scale."""

    grids: tuple[Grid, ...]
    scale: Scale
    is_pattern: bool = False  # small cells without numbers: what counts is the whole

    @property
    def is_large(self) -> bool:
        """Whether there are too many cells for one element each."""
        if any(grid.texts is not None for grid in self.grids):
            return False  # what stands in them is to be read
        count = sum(int(grid.numbers.size) for grid in self.grids)
        return count > (LARGE_PATTERN if self.is_pattern else LARGE)

    @property
    def decimals(self) -> int | None:
        """How many decimals the numbers in the cells have."""
        return decimals_of(value for grid in self.grids for value in grid.numbers.ravel().tolist())

    def text(self, grid: Grid, row: int, column: int) -> str:
        """What stands in a cell."""
        if grid.texts is not None:
            return visible(grid.texts[row][column])
        return short(float(grid.numbers[row, column]), self.decimals)


@final
@dataclass(frozen=True)
class Flow:
    """Tokens as running text, each on the colour of its number."""

    tokens: Places
    numbers: Any  # an array, [tokens]
    scale: Scale

    def tip(self, place: int) -> str:
        """One token in words."""
        value = self.numbers[place]
        number = "not a number (nan)" if math.isnan(value) else exact(value)
        return f"{self.tokens.told(place)}: {number}"


@final
@dataclass(frozen=True)
class Facts:
    """Some things to know, each with its name."""

    facts: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True)
class Verdict:
    """One sentence that counts, and whether it is good news."""

    text: str
    mood: Mood = ""


@final
@dataclass(frozen=True)
class Item:
    """One cell of a table: text, and how it is meant."""

    text: str
    mood: Mood = ""
    tip: str = ""


@final
@dataclass(frozen=True)
class Table:
    """Rows of text under their headings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Item, ...], ...]
    title: str = ""


@final
@dataclass(frozen=True)
class Branch:
    """A line of a tree, and those below it; `is_open` if these are seen at first."""

    name: str
    kind: str
    items: tuple[Item, ...] = ()
    below: tuple[Branch, ...] = ()
    is_open: bool = True


@final
@dataclass(frozen=True)
class Tree:
    """Branches with a column for each of `columns`."""

    columns: tuple[str, ...]
    roots: tuple[Branch, ...]
    title: str = ""


Part: TypeAlias = Grids | Flow | Facts | Verdict | Table | Tree
