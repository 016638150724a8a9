"""Numbers whose axes have names, and whose places have labels: what tools here hand back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from tracekit.errors import InputError, did_you_mean

# Where on an axis: a number (from the end, if negative), a label, or a stretch.
Where: TypeAlias = int | str | slice

TABLE = 40  # rows and columns of the text at most; the rest is left out, and that is said
WIDTH = 10  # characters of a column


class Axis(NamedTuple):
    """One axis: what it counts ("layer", "position", "head"), and a label for each place."""

    name: str
    labels: tuple[str, ...]


class Cell(NamedTuple):
    """One number, and the number of its place on each axis with the label there."""

    value: float
    place: tuple[int, ...]
    labels: tuple[str, ...]


@final
class Labelled:
    """An array with a name for each axis and a label for each place on it.

    `values` is a tensor with one axis for each of `axes`; `what` says what the numbers are
    ("logit difference"). `found.at(layer=3, position="Tower")` takes a part by number or label.
    """

    def __init__(self, values: Tensor, axes: Sequence[Axis], what: str = "") -> None:
        self.values = values
        self.axes = tuple(axes)
        self.what = what
        lengths = tuple(len(axis.labels) for axis in self.axes)
        if tuple(values.shape) != lengths:
            raise InputError(f"values of shape {list(values.shape)}, and {list(lengths)} labels.")

    @property
    def shape(self) -> tuple[int, ...]:
        """How many places each axis has."""
        return tuple(self.values.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """What each axis counts."""
        return tuple(axis.name for axis in self.axes)

    def labels(self, name: str) -> tuple[str, ...]:
        """The labels of an axis."""
        return self.axes[self._axis(name)].labels

    def at(self, **places: Where) -> Labelled:
        """The part at some places: an axis goes away at a number or a label, and stays at a slice.

        InputError for an unknown axis or label, and for a label that several places have.
        """
        index: list[Any] = [slice(None)] * len(self.axes)
        for name, where in places.items():
            number = self._axis(name)
            index[number] = self._place(self.axes[number], where)
        kept = [
            Axis(axis.name, axis.labels[part])
            for axis, part in zip(self.axes, index, strict=True)
            if isinstance(part, slice)
        ]
        return Labelled(self.values[tuple(index)], kept, self.what)

    def item(self) -> float:
        """The one number that is left."""
        return self.values.item()

    def mean(self, name: str) -> Labelled:
        """The mean along an axis, which goes away."""
        number = self._axis(name)
        left = [axis for each, axis in enumerate(self.axes) if each != number]
        return Labelled(self.values.mean(number), left, self.what)

    def top(self, count: int = 5) -> list[Cell]:
        """The largest numbers by size, whatever their sign; those that are no number are none."""
        flat = self.values.detach().flatten()
        sizes = flat.abs().nan_to_num(nan=-math.inf)
        found = [int(place) for place in sizes.argsort(descending=True, stable=True)]
        return [self._cell(place) for place in found[:count] if sizes[place] >= 0]

    def to_json(self) -> dict[str, Any]:
        """What it holds, in lists and strings; a number that is none is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
            return value if math.isfinite(value) else None

        axes = [{"name": axis.name, "labels": list(axis.labels)} for axis in self.axes]
        return {"what": self.what, "axes": axes, "values": plain(self.values.detach().tolist())}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis.name} {len(axis.labels)}" for axis in self.axes)
        head = f"Labelled({self.what + ': ' if self.what else ''}{sizes or self.item()})"
        if not 1 <= len(self.axes) <= 2 or not self.values.numel():
            return head
        return "\n".join([head, *self._table()])

    def _table(self) -> list[str]:
        values, only = self.values.detach(), Axis(self.axes[0].name, ("",))
        rows, columns = self.axes if len(self.axes) == 2 else (only, self.axes[0])
        if rows is only and max(map(len, columns.labels)) >= WIDTH:  # they are read downwards
            rows, columns = columns, rows
        return self._lines(rows, columns.labels, values.reshape(len(rows.labels), -1))

    def _lines(self, side: Axis, columns: Sequence[str], values: Tensor) -> list[str]:
        name, rows = side
        first = max(map(len, (name, *rows[:TABLE])))
        names = "".join(f"{label[: WIDTH - 1]:>{WIDTH}}" for label in columns[:TABLE])
        lines = [f"  {name:{first}}{names}".rstrip()]
        for label, row in zip(rows[:TABLE], values.tolist(), strict=False):
            numbers = "".join(f"{value:>{WIDTH}.3g}" for value in row[:TABLE])
            lines.append(f"  {label:{first}}{numbers}")
        if len(rows) > TABLE or len(columns) > TABLE:
            lines.append(f"  (the first {TABLE} of each axis)")
        return lines

    def _axis(self, name: str) -> int:
        if name not in self.names:
            cure = did_you_mean(name, self.names)
            raise InputError(f"{name!r} is no axis; there are {', '.join(self.names)}{cure or '.'}")
        return self.names.index(name)

    def _place(self, axis: Axis, where: Where) -> int | slice:
        if isinstance(where, slice):
            return where
        count = len(axis.labels)
        if isinstance(where, int):
            if not -count <= where < count:
                raise InputError(f"{axis.name}={where}: there are {count}.")
            return where % count
        found = [place for place, label in enumerate(axis.labels) if label == where]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{axis.name}={where!r} is at {found}: give the number of one.")
        cure = did_you_mean(where, axis.labels)
        raise InputError(f"{axis.name}={where!r}: no {axis.name} has that label{cure or '.'}")

    def _cell(self, place: int) -> Cell:
        where = torch.unravel_index(torch.tensor(place), self.values.shape)
        index = tuple(int(each) for each in where)
        labels = tuple(axis.labels[at] for axis, at in zip(self.axes, index, strict=True))
        return Cell(float(self.values[index]), index, labels)
