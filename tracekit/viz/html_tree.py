"""A tree in HTML: lines that open and close, with columns that stay under their headings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from tracekit.viz.parts import Branch, Item, Tree


def tree_html(part: Tree) -> str:
    """Nested <details>; each line is a row of the same grid of columns."""
    widths = " ".join(f"{size + 1}ch" for size in _widths(part))
    head = "".join(f"<span>{escape(name)}</span>" for name in ("module", *part.columns))
    lines = "".join(_branch(root, 0, len(part.columns)) for root in part.roots)
    return (
        f'<div class="tk-scroll" tabindex="0" role="group" aria-label="{escape(part.title)}">'
        f'<div class="tk-tree" style="--cols:minmax(17em,1fr) {widths}">'
        f'<div class="tk-line tk-heads">{head}</div>{lines}</div></div>'
    )


def _widths(part: Tree) -> list[int]:
    """How many characters the widest item of each column has."""
    every = list(_every(part.roots))
    return [
        max([len(name), *(len(each.items[at].text) for each in every if at < len(each.items))])
        for at, name in enumerate(part.columns)
    ]


def _every(branches: Iterable[Branch]) -> Iterator[Branch]:
    for branch in branches:
        yield branch
        yield from _every(branch.below)


def _branch(branch: Branch, depth: int, columns: int) -> str:
    line = _line(branch, depth, columns)
    if not branch.below:
        return f'<div class="tk-line">{line}</div>'
    below = "".join(_branch(each, depth + 1, columns) for each in branch.below)
    is_open = " open" if branch.is_open else ""
    return f'<details{is_open}><summary class="tk-line">{line}</summary>{below}</details>'


def _line(branch: Branch, depth: int, columns: int) -> str:
    kind = f" <em>{escape(branch.kind)}</em>" if branch.kind else ""
    name = f'<span style="padding-left:{depth * 1.1:.1f}em">{escape(branch.name)}{kind}</span>'
    items = "".join(
        f"<span{_class(item)}{_title(item)}>{escape(item.text)}</span>" for item in branch.items
    )
    return name + items + "<span></span>" * (columns - len(branch.items))


def _class(item: Item) -> str:
    return f' class="tk-{item.mood}"' if item.mood else ""


def _title(item: Item) -> str:
    return f' title="{escape(item.tip)}"' if item.tip else ""
