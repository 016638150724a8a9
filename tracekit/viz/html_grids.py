"""Heat maps in HTML: tables of coloured cells, small multiples, and their legend."""

from __future__ import annotations

from html import escape

from tracekit.viz.images import image_html, labels_html
from tracekit.viz.parts import Flow, Grid, Grids, Places, Scale
from tracekit.viz.wording import brief

_UPRIGHT = 20  # columns; the labels of more stand upright,
_LONG = 100  # and so do those of more characters in all


def grids_html(part: Grids) -> str:
    """All grids, under one legend."""
    head = legend_html(part)
    many = "".join(f'<div class="tk-one">{_grid(part, grid)}</div>' for grid in part.grids)
    labels = f" {labels_html(part.grids[0])}" if part.is_large else ""  # they are those of all
    return f'{head}<div class="tk-many"{labels}>{many}</div>'


def legend_html(part: Grids | Flow) -> str:
    """What the colours mean, in numbers; and the line that tells the cell one points at."""
    scale = part.scale
    ticks = "".join(f"<span>{escape(brief(tick))}</span>" for tick in scale.ticks)
    what = f"<span>{escape(scale.what)}</span>" if scale.what else ""
    bar = f'<div class="tk-bar"><i class="{scale.kind[0]}"></i><b>{ticks}</b></div>'
    has_more = isinstance(part, Grids) and any(grid.more is not None for grid in part.grids)
    say = f'<div class="tk-say{" tk-two" * has_more}" aria-live="polite"></div>'
    return f'<div class="tk-legend">{what}{bar}{say}</div>'


def colour_class(scale: Scale, value: float) -> str:
    """The class that gives a number its colour."""
    level = scale.level(value)
    return "tk-nan" if level is None else f"{scale.kind[0]}{level}"


def _grid(part: Grids, grid: Grid) -> str:
    title = f'<div class="tk-sub">{escape(grid.title)}</div>' if grid.title else ""
    if part.is_large:
        return f"{title}{image_html(part, grid)}"
    body = "".join(_row(part, grid, row) for row in range(len(grid.rows.labels)))
    shown = grid.columns.shown
    is_upright = part.is_pattern or len(shown) > _UPRIGHT or sum(map(len, shown)) > _LONG
    style = "tk-grid" + " tk-upright" * is_upright + " tk-small" * part.is_pattern
    label = escape(f"{grid.title or part.scale.what}: {grid.rows.name} by {grid.columns.name}")
    return (
        f'{title}<div class="tk-scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<table class="{style}">{_head(grid.rows, grid.columns)}<tbody>{body}</tbody></table>'
        "</div>"
    )


def _head(rows: Places, columns: Places) -> str:
    corner = " \\ ".join(filter(None, (rows.name, columns.name)))
    labels = "".join(
        f'<th scope="col" title="{escape(columns.told(place))}"><span>{escape(label)}</span></th>'
        for place, label in enumerate(columns.shown)
    )
    return f'<thead><tr><th scope="col"><span>{escape(corner)}</span></th>{labels}</tr></thead>'


def _row(part: Grids, grid: Grid, row: int) -> str:
    cells = "".join(_cell(part, grid, row, column) for column in range(grid.numbers.shape[1]))
    label, told = grid.rows.shown[row], grid.rows.told(row)
    head = f'<th scope="row" title="{escape(told)}"><span>{escape(label)}</span></th>'
    return f"<tr>{head}{cells}</tr>"


def _cell(part: Grids, grid: Grid, row: int, column: int) -> str:
    colour = colour_class(part.scale, float(grid.numbers[row, column]))
    tip = escape(grid.tip(row, column))
    text = "" if part.is_pattern else escape(part.text(grid, row, column))
    return f'<td class="{colour}" title="{tip}">{text}</td>'
