"""A tree in HTML: lines that open and close, with columns that stay under their headings."""

from __future__ import annotations

from html import escape

from tracekit.viz.parts import Branch, Tree


def tree_html(part: Tree) -> str:
    """Nested <details>; each line is a row of the same grid of columns."""
    widths = f"grid-template-columns:minmax(15em,1fr) repeat({len(part.columns)},max-content)"
    head = "".join(f"<span>{escape(name)}</span>" for name in ("module", *part.columns))
    lines = "".join(_branch(root, 0, len(part.columns)) for root in part.roots)
    notes = "".join(f'<div class="tk-soft">{escape(note)}</div>' for note in part.notes)
    return (
        f'<div class="tk-scroll" tabindex="0" role="group" aria-label="{escape(part.title)}">'
        f'<div class="tk-tree" style="{widths}"><div class="tk-line tk-heads">{head}</div>{lines}'
        f"</div></div>{notes}"
    )


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
        f'<span class="tk-{item.mood}" title="{escape(item.tip)}">{escape(item.text)}</span>'
        for item in branch.items
    )
    return name + items + "<span></span>" * (columns - len(branch.items))
