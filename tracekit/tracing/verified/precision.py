"""An edit in a model's own precision beside the same edit in float32: is its effect its own?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from tracekit.tracing.verified.report import EditCheck, EditReport, PrecisionCheck, Problem

# The effect in half precision is that of the edit, and of other roundings on the way; where less
# than so much of it is there in float32, or it is so many times as large there, it is not the same.
PART: Final = 0.25
_KEPT: Final = 0.5
_VANISHED: Final = ("changed-nothing", "precision-only")


def with_precision(report: EditReport, again: EditReport, dtype: str) -> EditReport:
    """The report of a run, with what came of the same edit in float32."""
    effect, in_float32 = _effect(report), _effect(again)
    known = {each.slug for each in report.problems}
    failed = [each for each in again.problems if each.slug not in known and each.edit is None]
    if failed:
        verdict = f"the edit could not be made so: {failed[0].text}"
        check = PrecisionCheck(dtype, effect, in_float32, "edit", verdict)
        return replace(report, precision=check, forwards=report.forwards + again.forwards)
    problems = list(_lost_to_rounding(report, again, dtype))
    named = {each.edit for each in problems}  # better than that it changed nothing
    kept = tuple(p for p in report.problems if p.edit not in named or p.slug not in _VANISHED)
    verdict = "the same edit has the same effect"
    if problems:
        verdict = f"the edit is lost to the rounding of {dtype}"
    elif in_float32 < PART * effect:
        verdict = f"most of the effect is the rounding of {dtype}"
        text = f"{verdict}: it is {effect:.3g}, and {in_float32:.3g} in float32."
        problems.append(Problem("precision-noise", text))
    elif effect < PART * in_float32:
        verdict = f"most of the effect is lost to the rounding of {dtype}"
        text = f"{verdict}: it is {effect:.3g}, and {in_float32:.3g} in float32."
        problems.append(Problem("precision-noise", text))
    check = PrecisionCheck(dtype, effect, in_float32, "edit", verdict)
    forwards = report.forwards + again.forwards
    found = replace(report, problems=kept, precision=check, forwards=forwards)
    return found.with_problems(problems)


def _lost_to_rounding(report: EditReport, again: EditReport, dtype: str) -> Iterator[Problem]:
    """Edits of which float32 keeps much more."""
    for own, other in zip(report.edits, again.edits, strict=False):
        change, in_float32 = _change(own), _change(other)
        site = own.landings[0].site if own.landings else own.what
        if change < _KEPT * in_float32:
            yield Problem(
                "precision-only",
                f"of the change of {site}, of norm {in_float32:.3g} in float32, {dtype} keeps "
                f"{change:.3g}: the rest is smaller than its rounding.",
                own.index,
            )


def _change(edit: EditCheck) -> float:
    return sum(landing.absolute**2 for landing in edit.landings) ** 0.5


def _effect(report: EditReport) -> float:
    """The greatest total variation, or how much of the result's norm it changed."""
    if report.logits is None:
        return report.result
    return max((value for row in report.logits.total_variation for value in row), default=0.0)
