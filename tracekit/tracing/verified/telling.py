"""The text of a report of edits: short when all is well, precise when it is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tracekit.tracing.verified.report import (
        EditCheck,
        EditReport,
        Landing,
        ModuleChange,
        Touched,
    )

_MOST: Final = 6  # of a list; the rest is counted


def told(report: EditReport) -> str:
    """All that a person wants to know."""
    lines = [_head(report)]
    for problem in report.problems:
        of = "" if problem.edit is None else f" (edit {problem.edit})"
        lines.append(f"  ! {problem.slug}{of}: {problem.text}")
    for edit in report.edits:
        lines += _edit(report, edit)
    lines += _around(report)
    lines += [f"  {note}" for note in report.notes]
    return "\n".join(lines)


def _head(report: EditReport) -> str:
    count = len(report.edits)
    landed = sum(edit.is_right for edit in report.edits)
    return f"{report.verdict}. {landed} of {count} edit{'s' * (count != 1)} landed as written."


def _edit(report: EditReport, edit: EditCheck) -> Iterator[str]:
    fired = f"fired at {edit.fired} of {edit.expected} places"
    if edit.expected is None:
        fired = f"fired {edit.fired} times" if edit.fired > 1 else "fired"
    source = f"  {edit.source}" if edit.source else ""
    where = f"line {edit.line}" if edit.line else edit.what
    yield f"  [{edit.index}] {where}{source}"
    yield f"      {edit.kind}, {fired}: {edit.verdict}"
    for landing in edit.landings[:_MOST]:
        yield f"      {_landing(report, landing)}"
    if len(edit.landings) > _MOST:
        yield f"      … at {len(edit.landings) - _MOST} more"


def _landing(report: EditReport, landing: Landing) -> str:
    call = f" (call {landing.call})" if landing.call else ""
    if not landing.elements[0]:
        return f"{landing.site}{call}: nothing changed"
    parts = [f"{landing.site}{call}: {_rows(report, landing.rows)}"]
    if landing.features is not None and landing.features[0] < landing.features[1]:
        parts.append(f"{landing.features[0]} of {landing.features[1]} features")
    size = f"changed by {_number(landing.relative)} of its norm"
    parts.append(f"{size} (largest element {_number(landing.largest)})")
    fate = _fate(landing)
    return "; ".join([*parts, *([fate] if fate else [])])


def _fate(landing: Landing) -> str:
    if landing.overwritten_by:
        return f"overwritten by {landing.overwritten_by}"
    told: list[str] = []
    if landing.is_there is False:
        told.append("LOST: the model went on with something else")
    if landing.changed_again_by:
        told.append(f"changed again by {landing.changed_again_by}")
    if landing.read_by:
        told.append(f"read by {_listed(landing.read_by, 2)}")
    if landing.in_cache is not None:
        told.append("in the cache" if landing.in_cache else "NOT what the cache holds")
    return ", ".join(told)


def _rows(report: EditReport, rows: Sequence[Touched]) -> str:
    if not rows:
        return "no row that could be told"
    if len(rows) > 1 and len({(row.positions, row.tokens) for row in rows}) == 1:
        numbers = [str(row.row) for row in rows]
        return f"rows {_listed(numbers, _MOST)}, {_positions(report, rows[0])}"
    shown = [f"row {row.row}, {_positions(report, row)}" for row in rows[:_MOST]]
    more = [f"{len(rows) - _MOST} more rows"] if len(rows) > _MOST else []
    return "; ".join([*shown, *more])


def _positions(report: EditReport, touched: Touched) -> str:
    if touched.positions is None:
        return "whole"
    real = [each for each in touched.positions if each >= 0]
    length = len(report.tokens[touched.row]) if touched.row < len(report.tokens) else 0
    padding = ", and padding" if len(real) < len(touched.positions) else ""
    if length and len(real) == length and length > 1:
        return f"all {length} positions{padding}"
    texts = dict(zip(touched.positions, touched.tokens or (), strict=False))
    shown = [f"{each} {texts[each]!r}" if texts.get(each) else str(each) for each in real]
    return f"position{'s' * (len(real) != 1)} {_listed(shown, _MOST)}{padding}"


def _around(report: EditReport) -> Iterator[str]:
    if report.changed_before:
        yield (
            f"  before: {len(report.changed_before)} of {report.before} values differ, first "
            f"{_change(report.changed_before[0])}"
        )
    elif report.before:
        yield f"  before: {report.before} values, bit-identical to the clean run"
    if report.first is not None:
        most = max(report.after, key=lambda each: each.relative or 0.0)
        yield (
            f"  after: {len(report.after)} values differ, {report.unchanged_after} do not; first "
            f"{_change(report.first)}; most {_change(most)}"
        )
    elif report.edits:
        yield "  after: nothing differs from the clean run"
    yield from _other_rows(report)
    yield from _logits(report)
    if report.precision is not None:
        found = report.precision
        yield (
            f"  float32: effect {_number(found.effect_in_float32)}, in {found.dtype} "
            f"{_number(found.effect)}: {found.verdict}"
        )
    yield f"  cost: {report.forwards} forward passes"


def _other_rows(report: EditReport) -> Iterator[str]:
    others = [row for row in report.rows if row.verdict != "edited"]
    for verdict in dict.fromkeys(row.verdict for row in others):
        numbers = [str(row.row) for row in others if row.verdict == verdict]
        worst = max(row.deviation for row in others if row.verdict == verdict)
        size = f" (by {_number(worst)})" if worst else ""
        yield f"  rows that were not edited: {_listed(numbers, 8)} {verdict}{size}"


def _logits(report: EditReport) -> Iterator[str]:
    if report.logits is None:
        if report.edits and not math.isnan(report.result):
            yield f"  result: changed by {_number(report.result)} of its norm"
        return
    found = report.logits
    worst, row, place = max(
        (
            (value, row, place)
            for row, values in enumerate(found.total_variation)
            for place, value in enumerate(values)
        ),
        default=(0.0, 0, 0),
    )
    if not worst and not found.largest:
        yield "  logits: bit-identical to the clean run"
        return
    divergence, position = found.divergence[row][place], found.positions[row][place]
    yield (
        f"  logits: total variation up to {_number(worst)} (row {row}, position {position}; KL "
        f"{_number(divergence)}), {len(found.flips)} top-1 flip{'s' * (len(found.flips) != 1)}"
    )
    for flip in found.flips[:3]:
        yield f"      row {flip.row}, position {flip.position}: {flip.was!r} -> {flip.is_now!r}"


def _change(change: ModuleChange) -> str:
    call = f" (call {change.call})" if change.call else ""
    size = "" if change.relative is None else f" ({_number(change.relative)} of its norm)"
    return f"{change.site}{call}{size}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _listed(parts: Sequence[str], most: int) -> str:
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more
