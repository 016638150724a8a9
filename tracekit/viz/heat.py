"""Labelled numbers as heat maps: one axis, two, or small multiples of three."""

from __future__ import annotations

from typing import Any

from tracekit.analysis import Axis, Labelled
from tracekit.errors import InputError
from tracekit.viz.parts import Flow, Grid, Grids, Part, Places, scale_of
from tracekit.viz.wording import as_numbers, brief

POSITIONS = ("position", "token", "query", "key")  # axes whose labels are tokens


def heat_of(
    found: Labelled, low: float | None = None, high: float | None = None, panels: str | None = None
) -> list[Part]:
    """The parts of a picture of labelled numbers; `panels` names the axis of small multiples.

    Positions alone are running text; InputError for none, and for more than three axes.
    """
    if not 1 <= len(found.axes) <= 3 or not found.values.numel():
        axes = " x ".join(f"{axis.name} {len(axis.labels)}" for axis in found.axes) or "one number"
        raise InputError(
            f"a heat map has 1, 2 or 3 axes with places, and this is {axes}: take a part, as in "
            f"found.at(layer=3), or a mean, as in found.mean('head')."
        )
    numbers = as_numbers(found.values)
    scale = scale_of(numbers.ravel().tolist(), "", low, high)
    if len(found.axes) == 1:
        only = _places(found.axes[0])
        if only.name in POSITIONS:
            return [Flow(only, numbers, scale)]
        return [Grids((Grid(Places("", (found.what,)), only, numbers[None]),), scale)]
    if len(found.axes) == 2:
        rows, columns = map(_places, found.axes)
        return [Grids((Grid(rows, columns, numbers),), scale)]
    return [Grids(_multiples(found, numbers, panels), scale)]


def largest(found: Labelled) -> str:
    """The number that counts most, with its place, in words."""
    cells = found.top(1)
    if not cells:
        return "none of the numbers is one"
    places = zip(found.axes, cells[0].place, strict=True)
    where = ", ".join(_places(axis).told(place) for axis, place in places)
    return f"{brief(cells[0].value)} at {where}"


def _multiples(found: Labelled, numbers: Any, panels: str | None) -> tuple[Grid, ...]:
    """A grid for each place of one axis: the heads, or the first axis."""
    name = panels or ("head" if "head" in found.names else found.names[0])
    if name not in found.names:
        raise InputError(f"panels={name!r} is no axis; there are {', '.join(found.names)}.")
    axis = found.names.index(name)
    rows, columns = (_places(each) for at, each in enumerate(found.axes) if at != axis)
    each = _places(found.axes[axis])
    return tuple(
        Grid(rows, columns, numbers.take(place, axis), each.told(place))
        for place in range(len(each.labels))
    )


def _places(axis: Axis) -> Places:
    return Places(axis.name, tuple(map(str, axis.labels)))
