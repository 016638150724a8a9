"""Tables, facts and verdicts in HTML."""

from __future__ import annotations

from html import escape

from tracekit.viz.parts import Facts, Item, Table, Verdict


def facts_html(part: Facts) -> str:
    """Names and what is known of each."""
    pairs = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in part.facts
    )
    return f'<dl class="tk-facts">{pairs}</dl>'


def verdict_html(part: Verdict) -> str:
    """One sentence, with the colour of its news."""
    return f'<div class="tk-verdict tk-{part.mood}">{escape(part.text)}</div>'


def table_html(part: Table) -> str:
    """Rows under headings, to be scrolled in itself."""
    title = f'<div class="tk-sub">{escape(part.title)}</div>' if part.title else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in part.columns)
    body = "".join(f"<tr>{''.join(map(_item, row))}</tr>" for row in part.rows)
    label = escape(part.title)
    return (
        f'{title}<div class="tk-scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<table class="tk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _item(item: Item) -> str:
    mood = f' class="tk-{item.mood}"' if item.mood else ""
    tip = f' title="{escape(item.tip)}"' if item.tip else ""
    return f"<td{mood}{tip}>{escape(item.text)}</td>"
