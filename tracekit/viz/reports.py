"""The report of a verified run: the verdict, where each edit landed, and what changed after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tracekit.tracing.verified.report import (
    EditCheck,
    EditReport,
    Landing,
    LogitsChange,
    ModuleChange,
    Touched,
)
from tracekit.tracing.verify import Verification
from tracekit.viz.parts import (
    Facts,
    Grid,
    Grids,
    Item,
    Mood,
    Part,
    Places,
    Scale,
    Table,
    Verdict,
)
from tracekit.viz.wording import brief, visible

_MOST = 8  # rows of the table of what changed
_FEW = 6  # things in one list
_EDITS = ("edit", "line", "code", "fired", "where", "of its norm", "largest", "then", "verdict")


def report_of(report: EditReport) -> list[Part]:
    """The parts of the picture, what is wrong first."""
    count, right = len(report.edits), sum(edit.is_right for edit in report.edits)
    landed = f"{right} of {count} edit{'s' * (count != 1)} landed as written"
    parts: list[Part] = [Verdict(f"{report.verdict}. {landed}.", "good" if report else "bad")]
    for problem in report.problems:
        of = "" if problem.edit is None else f" (edit {problem.edit})"
        parts.append(Verdict(f"{problem.slug}{of}: {problem.text}", "bad"))
    if report.edits:
        rows = tuple(row for edit in report.edits for row in _edit(report, edit))
        parts.append(_without_empty(Table(_EDITS, rows, "Edits")))
    parts.append(Facts(tuple(_facts(report))))
    if report.logits is not None:
        parts += _logits(report, report.logits)
    if report.after:
        parts.append(_changed(report.after))
    return parts


def verification_of(found: Verification) -> list[Part]:
    """The parts of a picture of `cache.verify()`: how far each site is from the recompute."""
    compared = [check for check in found if check.deviation is not None]
    agree = (
        f"{len(compared) - len(found.wrong)} of {len(compared)} sites agree within "
        f"{found.tolerance:.0e} of their largest value; {len(found) - len(compared)} not compared."
    )
    moods: dict[bool | None, Mood] = {True: "good", False: "bad", None: "note"}
    rows = tuple(
        (
            Item(check.site, "code"),
            Item("" if check.deviation is None else f"{check.deviation:.1e}", "number"),
            Item("" if check.row is None else str(check.row), "number"),
            Item("" if check.position is None else str(check.position), "number"),
            Item(check.verdict, moods[check.is_right]),
        )
        for check in found
    )
    columns = ("site", "deviation", "row", "position", "verdict")
    head = "VERIFIED" if found else "NOT VERIFIED"
    return [Verdict(f"{head}. {agree}", "good" if found else "bad"), Table(columns, rows, "Sites")]


def _edit(report: EditReport, edit: EditCheck) -> Iterator[tuple[Item, ...]]:
    """A row for each place where it landed; one without, where it landed nowhere."""
    of = "" if edit.expected is None else f" of {edit.expected}"
    own = [
        Item(str(edit.index), "number"),
        Item(str(edit.line) if edit.line else "", "number", edit.file),
        Item(edit.source or edit.what, "code", edit.kind),
        Item(f"{edit.fired}{of}"),
    ]
    verdict = Item(edit.verdict, "good" if edit.is_right else "bad")
    if not edit.landings:
        yield (*own, Item("nowhere", "bad"), Item(""), Item(""), Item(""), verdict)
    for landing in edit.landings:
        yield (*own, *_landing(report, landing), verdict)
        own, verdict = [Item("")] * 4, Item("")


def _without_empty(table: Table) -> Table:
    """The columns in which something stands."""
    kept = [at for at in range(len(table.columns)) if any(row[at].text for row in table.rows)]
    rows = tuple(tuple(row[at] for at in kept) for row in table.rows)
    return Table(tuple(table.columns[at] for at in kept), rows, table.title)


def _landing(report: EditReport, landing: Landing) -> tuple[Item, ...]:
    call = f" (call {landing.call})" if landing.call else ""
    rows = "; ".join(_touched(report, each) for each in landing.rows[:_FEW])
    more = f"; {len(landing.rows) - _FEW} more rows" if len(landing.rows) > _FEW else ""
    if not landing.elements[0]:
        return Item(f"{landing.site}{call}: nothing changed", "bad"), Item(""), Item(""), Item("")
    changed, every = landing.elements
    return (
        Item(f"{landing.site}{call}: {rows}{more}", "", f"{changed} of {every} elements"),
        Item(brief(landing.relative), "number", str(landing.relative)),
        Item(brief(landing.largest), "number", str(landing.largest)),
        _fate(landing),
    )


def _fate(landing: Landing) -> Item:
    if landing.overwritten_by:
        return Item(f"overwritten by {landing.overwritten_by}", "bad")
    if landing.is_there is False:
        return Item("lost: the model went on with something else", "bad")
    if landing.in_cache is False:
        return Item("not what the cache holds", "bad")
    told = [f"changed again by {landing.changed_again_by}"] if landing.changed_again_by else []
    told += [f"read by {_listed(landing.read_by, 2)}"] if landing.read_by else []
    told += ["in the cache"] if landing.in_cache else []
    return Item(", ".join(told))


def _touched(report: EditReport, touched: Touched) -> str:
    row = f"row {touched.row}, " if len(report.tokens) > 1 else ""
    if touched.positions is None:
        return f"{row}whole"
    length = len(report.tokens[touched.row]) if touched.row < len(report.tokens) else 0
    if length > 1 and len(touched.positions) == length:
        return f"{row}all {length} positions"
    texts = touched.tokens or ("",) * len(touched.positions)
    pairs = zip(touched.positions, texts, strict=False)
    shown = [f"{place} {visible(text)}" if text else str(place) for place, text in pairs]
    return f"{row}position{'s' * (len(shown) != 1)} {_listed(shown, _FEW)}"


def _facts(report: EditReport) -> Iterator[tuple[str, str]]:
    different = len(report.changed_before)
    same = "all bit-identical to the clean run" if not different else f"{different} differ"
    yield "before the edit", f"{report.before} values, {same}"
    if report.first is not None:
        every = len(report.after) + report.unchanged_after
        yield "behind it", f"{len(report.after)} of {every} values differ"
        yield "the first that differs", report.first.site
    for row in report.rows:
        if row.verdict != "edited":
            size = f", by {brief(row.deviation)}" if row.deviation else ""
            yield f"row {row.row}, not edited", f"{row.verdict}{size}"
    if report.logits is None:
        yield "result", f"changed by {brief(report.result)} of its norm"
    else:
        flips = report.logits.flips
        told = [
            f"{'row ' + str(each.row) + ', ' if len(report.tokens) > 1 else ''}"
            f"position {each.position}: {visible(each.was)} → {visible(each.is_now)}"
            for each in flips
        ]
        yield "likeliest tokens", _listed(told, _FEW, "; ") if told else "as before, everywhere"
    if report.precision is not None:
        found = report.precision
        effects = f"effect {brief(found.effect_in_float32)}, in {found.dtype} {brief(found.effect)}"
        yield "in float32", f"{effects}: {found.verdict}"
    yield "cost", f"{report.forwards} forward passes"
    for note in report.notes:
        yield "note", note


def _logits(report: EditReport, found: LogitsChange) -> list[Part]:
    """How far the predictions moved, token by token."""
    rows = len(found.positions)
    columns = 1 + max((place for row in found.positions for place in row), default=-1)
    if not columns:
        return []
    numbers: Any = np.full((rows, columns), np.nan, "float32")
    texts = [[""] * columns for _ in range(rows)]
    for row, (places, values) in enumerate(
        zip(found.positions, found.total_variation, strict=True)
    ):
        numbers[row, list(places)] = values
        tokens = report.tokens[row] if row < len(report.tokens) else ()
        texts[row][: len(tokens)] = tokens[:columns]
    grid = Grid(
        Places("row", tuple(map(str, range(rows)))),
        Places("position", tuple(map(str, range(columns)))),
        numbers,
        "What became of the prediction behind each token",
        texts=texts,
    )
    return [Grids((grid,), Scale("sequential", 0.0, 1.0, "total variation"))]


def _changed(after: Sequence[ModuleChange]) -> Table:
    rows = tuple(
        (
            Item(f"{change.site}{f' (call {change.call})' if change.call else ''}", "code"),
            Item(_size(change.relative), "number"),
            Item(_size(change.largest), "number"),
            Item(", ".join(map(str, change.rows))),
        )
        for change in after[:_MOST]
    )
    more = f", the first {_MOST} of {len(after)}" if len(after) > _MOST else ""
    return Table(("value", "of its norm", "largest", "rows"), rows, f"What differs behind it{more}")


def _size(value: float | None) -> str:
    return "" if value is None else brief(value)


def _listed(parts: Sequence[str], most: int, joint: str = ", ") -> str:
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return joint.join(parts[:most]) + more
