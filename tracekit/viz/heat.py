"""Labelled numbers as heat maps: one axis, two, or small multiples of three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tracekit.analysis import Axis, Labelled
from tracekit.errors import InputError
from tracekit.viz.parts import Flow, Grid, Grids, Part, Places, scale_of
from tracekit.viz.wording import as_numbers, brief

_SHORT = 6  # characters; a longer label is too wide for the head of a column


def heat_of(
    found: Labelled,
    low: float | None = None,
    high: float | None = None,
    panels: str | None = None,
    beside: Labelled | None = None,
) -> list[Part]:
    """The parts of a picture of labelled numbers; `panels` names the axis of small multiples.

    `beside` has other numbers of the same places, told with each. Positions alone are running
    text; InputError for none, and for more than three axes.
    """
    if not 1 <= len(found.axes) <= 3 or not found.values.numel():
        axes = " x ".join(f"{axis.name} {len(axis.labels)}" for axis in found.axes) or "one number"
        raise InputError(
            f"a heat map has 1, 2 or 3 axes with places, and this is {axes}: take a part, as in "
            f"found.at(layer=3), or a mean, as in found.mean('head')."
        )
    numbers = as_numbers(found.values)
    scale = scale_of(numbers.ravel().tolist(), "", low, high)
    if len(found.axes) == 1 and beside is None and _places(found.axes[0]).is_text:
        return [Flow(_places(found.axes[0]), numbers, scale)]
    if len(found.axes) == 3:
        return [Grids(_multiples(found, panels, beside), scale)]
    return [Grids((labelled_grid(found, beside=beside),), scale)]


def labelled_grid(found: Labelled, title: str = "", beside: Labelled | None = None) -> Grid:
    """One or two axes as a grid; one whose labels are words goes down, so that they fit."""
    numbers, more = as_numbers(found.values), _told_beside(beside)
    if len(found.axes) == 1:
        only, other = _places(found.axes[0]), Places("", ("",))
        if beside is None and max(map(len, only.labels)) > _SHORT:
            return Grid(only, other, numbers[:, None], title, told=title)
        return Grid(other, only, numbers[None], title, more=more, told=title)
    rows, columns = map(_places, found.axes)
    return Grid(rows, columns, numbers, title, more=more, told=title)


def largest(found: Labelled) -> str:
    """The number that counts most, with its place, in words."""
    cells = found.top(1)
    if not cells:
        return "none of the numbers is one"
    return f"{brief(cells[0].value)} at {told_at(found.axes, cells[0].place)}"


def told_at(axes: Sequence[Axis], place: Sequence[int]) -> str:
    """One place in words."""
    return ", ".join(_places(axis).told(at) for axis, at in zip(axes, place, strict=True))


def _multiples(found: Labelled, panels: str | None, beside: Labelled | None) -> tuple[Grid, ...]:
    """A grid for each place of one axis: the heads, or the first axis."""
    name = panels or ("head" if "head" in found.names else found.names[0])
    if name not in found.names:
        raise InputError(f"panels={name!r} is no axis; there are {', '.join(found.names)}.")
    each = _places(found.axes[found.names.index(name)])
    return tuple(
        labelled_grid(
            found.at(**{name: place}),
            each.told(place),
            None if beside is None else beside.at(**{name: place}),
        )
        for place in range(len(each.labels))
    )


def _told_beside(beside: Labelled | None) -> Callable[[int, int], str] | None:
    if beside is None:
        return None
    numbers: Any = as_numbers(beside.values).reshape(-1, len(beside.axes[-1].labels))
    return lambda row, column: f"{beside.what} {brief(float(numbers[row, column]))}"


def _places(axis: Axis) -> Places:
    return Places(axis.name, tuple(map(str, axis.labels)))
