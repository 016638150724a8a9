"""A Picture shows itself in a notebook and in a terminal, and is saved as a page, PNG or text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from tracekit.errors import InputError
from tracekit.viz.html import fragment, page
from tracekit.viz.parts import Part
from tracekit.viz.text import for_terminal, plain, renderables

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


@final
class Picture:
    """What `tracekit.show` makes: seen in a notebook, printed in a terminal, saved to a file.

    `.html` is a piece that needs nothing from outside, for any page; `.text` the same without
    colours; `.save("x.html")`, `.save("x.png")` and `.save("x.txt")` write files.
    """

    def __init__(self, title: str, parts: Sequence[Part]) -> None:
        self.title = title
        self.parts = tuple(parts)

    @property
    def html(self) -> str:
        """The picture as a piece of HTML, which works in any page, and any number of times."""
        return fragment(self.title, self.parts)

    @property
    def text(self) -> str:
        """The picture as text without colours, 100 characters wide."""
        return plain(self.title, self.parts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a whole page (.html), an image (.png, by matplotlib), or text (.txt).

        InputError for any other ending; UnsupportedError where matplotlib is not installed.
        """
        path = Path(path)
        match path.suffix.lower():
            case ".html":
                path.write_text(page(self.title, self.parts), "utf-8")
            case ".txt":
                path.write_text(self.text + "\n", "utf-8")
            case ".png":
                from tracekit.viz.png import write_png

                write_png(self.title, self.parts, path)
            case ending:
                told = ending or "without an ending"
                raise InputError(
                    f"a picture is saved as .html, .png or .txt, not {told}: {path.name!r}."
                )
        return path

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return for_terminal(self.title, self.parts)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield from renderables(self.title, self.parts, options.max_width)
