"""Tokens in HTML: running text, each token on the colour of its number."""

from __future__ import annotations

from html import escape

from tracekit.viz.html_grids import colour_class, legend_html
from tracekit.viz.parts import Flow


def flow_html(part: Flow) -> str:
    """The tokens under their legend; behind a token with a line break the line is broken."""
    tokens = "".join(_token(part, place) for place in range(len(part.tokens.labels)))
    return (
        f'{legend_html(part)}<p class="tk-flow tk-scroll" tabindex="0" role="group" '
        f'aria-label="{escape(part.tokens.name)}">{tokens}</p>'
    )


def _token(part: Flow, place: int) -> str:
    colour = colour_class(part.scale, float(part.numbers[place]))
    label, shown = part.tokens.labels[place], part.tokens.shown[place]
    broken = "<br>" if "\n" in label else "<wbr>"
    return (
        f'<span class="{colour}" title="{escape(part.tip(place))}">{escape(shown)}</span>{broken}'
    )
