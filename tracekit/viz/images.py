"""Large heat maps in HTML: an image of a pixel for each cell, and the numbers to point at."""

# Tens of thousands of elements would be megabytes. The image is seen without any script; the
# numbers lie beside it, two or four bytes each, and the script tells the one that is pointed at.

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64encode
from html import escape
from typing import Any, Final

import numpy as np

from tracekit.viz.colours import Theme, palette
from tracekit.viz.parts import Grid, Grids, Scale

_NONE: Final = {"light": "#c9ced4", "dark": "#4a525c"}  # of what is no number
_CLOSE: Final = 1e-3  # how far a number of two bytes may be from what it stands for, relative
_TINY: Final = 1e-7  # below it, relative closeness is not asked for
_CELL: Final = 12  # pixels of the screen that a cell has at most
_SIDES: Final = ((2, 384),)  # pixels of an image, where there are at most so many
_SIDE: Final = 256  # and where there are more
_LABELLED: Final = 40  # rows and columns at most that have their labels beside the image


def image_html(part: Grids, grid: Grid) -> str:
    """A grid as an image for each theme, with its labels and numbers for the script."""
    rows, columns = grid.numbers.shape
    side = next((size for most, size in _SIDES if len(part.grids) <= most), _SIDE)
    is_framed = max(rows, columns) <= _LABELLED
    scale = _CELL if is_framed else min(_CELL, side / max(rows, columns))
    style = f"width:{columns * scale:.0f}px;aspect-ratio:{columns}/{rows}"
    pictures = "".join(
        f'<img class="tk-{theme}" alt="" src="{_image(part.scale, grid, theme)}">'
        for theme in ("light", "dark")
    )
    known = {"told": escape(grid.told), **_numbers(grid.numbers)}
    numbers = " ".join(f'data-{name}="{value}"' for name, value in known.items())
    image = (
        f'<div class="tk-image" style="{style}" tabindex="0" role="img" '
        f'aria-label="{escape(_summary(grid))}" {numbers}>{pictures}<b hidden></b></div>'
    )
    return _framed(grid, image) if is_framed else image


def _framed(grid: Grid, image: str) -> str:
    """An image with the labels of its columns above, and those of its rows to the left."""
    above, left = (
        "".join(f"<span>{escape(label)}</span>" for label in places.shown)
        for places in (grid.columns, grid.rows)
    )
    corner = escape(" \\ ".join(filter(None, (grid.rows.name, grid.columns.name))))
    return (
        f'<div class="tk-scroll"><div class="tk-framed"><div>{corner}</div>'
        f'<div aria-hidden="true">{above}</div><div aria-hidden="true">{left}</div>{image}'
        f"</div></div>"
    )


def labels_html(grid: Grid) -> str:
    """The labels of a grid for the script, as an attribute."""
    labels = {
        "rows": [grid.rows.told(place) for place in range(len(grid.rows.labels))],
        "columns": [grid.columns.told(place) for place in range(len(grid.columns.labels))],
        "joint": grid.joint,
    }
    told = json.dumps(labels, ensure_ascii=False, separators=(",", ":"))
    return f'data-labels="{escape(told)}"'


def _summary(grid: Grid) -> str:
    """What the image shows, for who does not see it."""
    title = f"{grid.title}: " if grid.title else ""
    if np.isnan(grid.numbers).all():
        return f"{title}no numbers"
    row, column = np.unravel_index(np.nanargmax(np.abs(grid.numbers)), grid.numbers.shape)
    size = f"{grid.numbers.shape[0]} by {grid.numbers.shape[1]} numbers"
    return f"{title}{size}; the largest is {grid.tip(int(row), int(column))}"


def _numbers(numbers: Any) -> dict[str, str]:
    """The numbers as text: two bytes each if that is close enough, and no triangle of zeros."""
    size = numbers.shape[0] == numbers.shape[1]
    is_lower = bool(size and not np.triu(numbers, 1).any())
    kept = numbers[np.tril_indices(len(numbers))] if is_lower else numbers.ravel()
    with np.errstate(over="ignore"):
        halves, singles = kept.astype("<f2"), kept.astype("<f4")
        error = np.abs(halves.astype(np.float64) - kept)
    known = np.isfinite(kept)
    is_close = bool((error <= np.maximum(_CLOSE * np.abs(kept), _TINY))[known].all())
    data = b64encode((halves if is_close else singles).tobytes()).decode()
    return {"bytes": "2" if is_close else "4", "lower": str(int(is_lower)), "numbers": data}


def _image(scale: Scale, grid: Grid, theme: Theme) -> str:
    colours = [*palette(scale.kind, theme), _NONE[theme]]
    levels = [[scale.level(value) for value in row] for row in grid.numbers.tolist()]
    none = len(colours) - 1
    rows = [bytes(none if level is None else level for level in row) for row in levels]
    return "data:image/png;base64," + b64encode(indexed_png(rows, colours)).decode()


def indexed_png(rows: list[bytes], colours: list[str]) -> bytes:
    """A PNG of which each pixel is the number of a colour."""
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    table = bytes.fromhex("".join(colour[1:] for colour in colours))
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    chunks = ((b"IHDR", head), (b"PLTE", table), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
