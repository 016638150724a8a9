"""A picture as HTML: one piece that needs nothing from outside, and disturbs nothing around it."""

# Every rule of the style begins with .tk-viz, no element has an id, and the script takes care of
# all pictures that have none yet: so there may be many on a page. What the script does is a
# comfort; without it every cell still has its title.

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Final

from tracekit.viz.colours import KINDS, STEPS, Kind, palette, text_on
from tracekit.viz.html_grids import grids_html
from tracekit.viz.html_tables import facts_html, table_html, verdict_html
from tracekit.viz.html_tokens import flow_html
from tracekit.viz.html_tree import tree_html
from tracekit.viz.parts import Facts, Flow, Grids, Part, Table, Tree, Verdict

_PAGE: Final = (
    "<!doctype html>\n"
    '<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    "<title>{title}</title>"
    "<style>body{{margin:16px;background:#fff;background:light-dark(#fff,#111418)}}</style></head>"
    "<body>\n{fragment}\n</body></html>\n"
)


def page(title: str, parts: Sequence[Part]) -> str:
    """A whole page."""
    return _PAGE.format(title=escape(title), fragment=fragment(title, parts))


def fragment(title: str, parts: Sequence[Part]) -> str:
    """A piece to put into any page."""
    head = f'<div class="tk-title">{escape(title)}</div>' if title else ""
    body = "".join(f'<div class="tk-part">{_part(part)}</div>' for part in parts)
    used = {part.scale.kind for part in parts if isinstance(part, Grids | Flow)}
    colours = "".join(_colours(kind) for kind in KINDS if kind in used)
    return (
        f'<div class="tk-viz" role="figure" aria-label="{escape(title)}">'
        f"<style>{_resource('style.css')}{colours}"
        f"</style>{head}{body}<script>{_resource('hover.js')}</script></div>"
    )


def _part(part: Part) -> str:
    match part:
        case Grids():
            return grids_html(part)
        case Flow():
            return flow_html(part)
        case Facts():
            return facts_html(part)
        case Verdict():
            return verdict_html(part)
        case Table():
            return table_html(part)
        case Tree():
            return tree_html(part)


def _resource(name: str) -> str:
    return files("tracekit.viz").joinpath(name).read_text("utf-8").replace("\n", "")


def _colours(kind: Kind) -> str:
    """The classes of a scale's colours, and that of its legend."""
    pairs = list(zip(palette(kind, "light"), palette(kind, "dark"), strict=True))
    rules = [
        f".tk-viz .{kind[0]}{step}{{background:{light};background:light-dark({light},{dark});"
        f"color:light-dark({text_on(light)},{text_on(dark)})}}"
        for step, (light, dark) in enumerate(pairs)
    ]
    stops = ",".join(f"light-dark({light},{dark})" for light, dark in pairs[:: STEPS // 8])
    plain = ",".join(light for light, _ in pairs[:: STEPS // 8])
    bar = f".tk-viz .tk-bar .{kind[0]}{{background:linear-gradient(90deg,{plain});"
    return "".join(rules) + f"{bar}background:linear-gradient(90deg,{stops})}}"
