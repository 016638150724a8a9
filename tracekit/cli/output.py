"""Text for a terminal and JSON for programs: width, colours, and what an encoding can't say."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from tracekit.errors import InputError

_STYLES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
_MARKS: Final = {"├── ": "|-- ", "└── ": "`-- ", "│   ": "|   ", "…": "..."}


def say(text: str = "") -> None:
    """Print, with replacements for characters that standard output can't encode."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for mark, plain in _MARKS.items():
            text = text.replace(mark, plain)
        text = text.encode(encoding, "replace").decode(encoding)
    print(text, flush=True)


def say_json(data: Any) -> None:
    """Print as JSON; a number that is none is null."""
    print(json.dumps(_plain(data), indent=2, allow_nan=False))


def save(thing: Any, path: str) -> None:
    """Write the picture of an answer; InputError for a file that can't be written."""
    from tracekit.viz import show

    try:
        show(thing).save(path)
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}.") from error


def styled(text: str, style: str) -> str:
    """The text in bold or a colour, where standard output is a terminal that wants it."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if has_colours() else text


def has_colours() -> bool:
    """Whether standard output is a terminal, and nobody said that it should be plain."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not is_plain


def width() -> int | None:
    """The columns of the terminal; None where output goes elsewhere, and needs no limit."""
    is_limited = sys.stdout.isatty() or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if is_limited else None


def columns_of(text: str) -> int:
    """How many columns a text takes: of Chinese characters two each, of accents none."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in text
    )


def padded(text: str, columns: int, is_right: bool = False) -> str:
    """The text with spaces up to that many columns; behind it, or in front."""
    space = " " * (columns - columns_of(text))
    return space + text if is_right else text + space


def clipped(text: str, columns: int | None) -> str:
    """The text, cut to that many columns, with a mark where it was."""
    if columns is None or columns_of(text) <= columns:
        return text
    kept = ""
    for each in text:
        if columns_of(kept + each) >= columns:
            break
        kept += each
    return f"{kept}…"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines, each column as wide as its longest text; `right` columns end flush."""
    count = max(map(len, rows), default=0)
    sizes = [max((columns_of(row[at]) for row in rows if at < len(row)), default=0)
             for at in range(count)]  # fmt: skip
    return [
        "  ".join(padded(text, sizes[at], at in right) for at, text in enumerate(row)).rstrip()
        for row in rows
    ]


def shown(token: str) -> str:
    """The text of a token as it can stand in a table: with quotes, so that spaces are seen."""
    return repr(token)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(each) for key, each in cast("Mapping[Any, Any]", data).items()}
    if isinstance(data, (list, tuple)):
        return [_plain(each) for each in cast("Sequence[Any]", data)]
    return None if isinstance(data, float) and not math.isfinite(data) else data
