"""A picture as a PNG, by matplotlib: numbers as colours, all else as the text of the picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tracekit.errors import UnsupportedError
from tracekit.viz.parts import Flow, Grids, Part
from tracekit.viz.png_blocks import MARGIN, Block, FlowBlock, GridRow, Legend, Words
from tracekit.viz.text import plain

_DPI: Final = 144
_WIDEST: Final = 14.0  # inches of grids beside each other


def write_png(title: str, parts: Sequence[Part], path: Path) -> None:
    """Draw the parts below each other; UnsupportedError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "a picture is saved as PNG by matplotlib, which is not installed: "
            'pip install "tracekit[viz]", or save it as .html or .txt.'
        ) from error
    blocks = [Words(title, is_heading=True)] if title else []
    blocks += [block for part in parts for block in _blocks(part)]
    width = max(block.width for block in blocks) + 2 * MARGIN
    height = sum(block.height + MARGIN for block in blocks) + MARGIN
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # in inches, downward
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    top = MARGIN
    for block in blocks:
        block.draw(axes, MARGIN, top)
        top += block.height + MARGIN
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks one: a box is drawn
        figure.savefig(path)


def _blocks(part: Part) -> Iterator[Block]:
    if isinstance(part, Flow):
        yield Legend(part.scale)
        yield FlowBlock(part)
    elif isinstance(part, Grids):
        yield Legend(part.scale)
        row: list[GridRow] = []
        for grid in part.grids:
            one = GridRow(part, (grid,))
            joined = GridRow(part, (*row[-1].grids, grid)) if row else one
            row = [*row[:-1], joined] if row and joined.width <= _WIDEST else [*row, one]
        yield from row
    else:
        yield Words(plain("", [part]))
