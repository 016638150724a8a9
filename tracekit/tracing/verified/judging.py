"""From what was claimed of the edits of a run, and what plain hooks saw: the report."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from tracekit.core.site import Line
from tracekit.core.tree import Tree
from tracekit.errors import NeverRanError, TracekitError
from tracekit.tracing.replay import TOLERANCES
from tracekit.tracing.touches import Origin, Touch, Touches
from tracekit.tracing.verified.comparison import Comparison
from tracekit.tracing.verified.grid import Tell
from tracekit.tracing.verified.landing import landing_of
from tracekit.tracing.verified.losses import is_lost
from tracekit.tracing.verified.predictions import change_of_logits
from tracekit.tracing.verified.report import (
    EditCheck,
    EditReport,
    Landing,
    LogitsChange,
    Problem,
    RowCheck,
)

ROUNDING: Final = 1.0  # a change of so many times a number's precision is no more than rounding


@final
@dataclass(frozen=True)
class Found:
    """All that is known when the runs are over."""

    tree: Tree
    touches: Touches
    comparison: Comparison
    tell: Tell | None
    clean: Tensor | None  # what the run without edits returned
    bare: Tensor | None  # and without any hooks
    result: Tensor | None
    has_logits: bool
    error: BaseException | None
    forwards: int
    notes: Sequence[str]


def judged(found: Found) -> EditReport:
    """What came of the edits."""
    groups = list(_groups(found.touches))
    checks: list[EditCheck] = []
    problems: list[Problem] = []
    for index, (origin, touches) in enumerate(groups):
        landings = [landing_of(touch, found.comparison, found.tell) for touch in touches]
        checks.append(_check(index, origin, touches, landings))
        problems += _problems(found, index, origin, touches, landings)
    if not any(problem.slug == "never-fired" for problem in problems):
        problems += _of_the_error(found.error)
    if not groups and found.error is None:
        text = "no edit was made in this run: nothing was written, and nothing changed in place."
        problems.append(Problem("no-edit", text))
    return _whole(found, checks, problems)


def _groups(touches: Touches) -> Iterator[tuple[Origin | None, list[Touch]]]:
    """What each line, or each function, did; those that did nothing too."""
    by_key: dict[object, list[Touch]] = {}
    for origin in touches.origins:
        by_key[origin] = []
    for touch in touches.every:
        line = touch.line
        file = line.file if isinstance(line, Line) else ""
        key = touch.origin or (file, str(line), touch.invoke)
        by_key.setdefault(key, []).append(touch)
    last = len(touches.every)
    ordered = sorted(by_key.items(), key=lambda each: each[1][0].order if each[1] else last)
    for key, group in ordered:
        if not group and key in touches.called:
            continue  # it only looked
        yield (key if isinstance(key, Origin) else None), group


def _check(
    index: int, origin: Origin | None, touches: list[Touch], landings: list[Landing]
) -> EditCheck:
    first = touches[0] if touches else None
    sites = list(dict.fromkeys(str(touch.site) for touch in touches))
    line = first.line if first is not None else ""
    number = line.number if isinstance(line, Line) else 0
    file = line.file if isinstance(line, Line) else ""
    what = sites[0] + (f" and {len(sites) - 1} more" if len(sites) > 1 else "") if sites else ""
    if origin is not None:
        what, file, number = origin.what, origin.file, origin.line
    return EditCheck(
        index,
        first.kind if first is not None else origin.kind if origin is not None else "",
        what,
        file,
        number,
        linecache.getline(file, number).strip(),
        first.invoke if first is not None else None,
        len({touch.seen for touch in touches}),
        origin.expected if origin is not None else None,
        tuple(landings),
        "as written",
    )


# -- what is wrong with an edit -------------------------------------------------------------------


def _problems(
    found: Found,
    index: int,
    origin: Origin | None,
    touches: list[Touch],
    landings: list[Landing],
) -> Iterator[Problem]:
    if not touches:
        assert origin is not None
        text = f"{origin.what} was never made: the model did not come to its module."
        if isinstance(found.error, NeverRanError):
            text = str(found.error.args[0])
        yield Problem("never-fired", text, index)
        return
    if not any(each.elements[0] for each in landings):
        yield _changed_nothing(index, touches)
        return
    for touch, landing in zip(touches, landings, strict=True):
        if landing.elements[0]:
            yield from _of_landing(found, index, touch, landing)
    if all(_is_rounding(touch) for touch in touches):
        dtype = str(touches[0].after.dtype).removeprefix("torch.")
        text = f"the change of {landings[0].site} is no more than the rounding of {dtype}."
        yield Problem("precision-only", text, index)


def _of_landing(found: Found, index: int, touch: Touch, landing: Landing) -> Iterator[Problem]:
    if touch.overwritten_by:
        text = f"what was written to {landing.site} was overwritten by {touch.overwritten_by}."
        yield Problem("overwritten", text, index)
        return
    if touch.is_there is False:
        text = f"the model did not go on with what was written to {landing.site}."
        yield Problem("lost", text, index)
    elif touch.not_read_by and not touch.read_by:
        text = (
            f"{touch.not_read_by[0]} is given what {landing.site} was before the edit: the model "
            f"goes on with a copy, or in another way."
        )
        yield Problem("lost", text, index)
    elif is_lost(touch, found.tree, found.comparison, found.touches, found.clean, found.result):
        text = (
            f"nothing that comes after {landing.site} is changed by the edit: the model does not "
            f"read it (a copy, or a fused way past the module)."
        )
        yield Problem("lost", text, index)
    if touch.in_cache is False:
        text = f"the cache of the run does not hold what was written to {landing.site}."
        yield Problem("not-in-cache", text, index)


def _changed_nothing(index: int, touches: list[Touch]) -> Problem:
    touch = touches[0]
    text = f"what was written to {touch.site} is what was there."
    if touch.after.dtype in (torch.bfloat16, torch.float16):
        dtype = str(touch.after.dtype).removeprefix("torch.")
        text += f" In {dtype}, a change that is smaller than its rounding is lost so."
    return Problem("changed-nothing", text, index)


def _is_rounding(touch: Touch) -> bool:
    """Whether it changed no number by more than its precision."""
    if touch.before is None or not touch.after.is_floating_point():
        return False
    mask = touch.is_changed
    if touch.before.shape != touch.after.shape or not bool(mask.any()):
        return True
    before, after = touch.before[mask].double(), touch.after[mask].double()
    eps = torch.finfo(touch.after.dtype).eps
    return bool(((after - before).abs() <= ROUNDING * eps * before.abs()).all())


# -- what is wrong with the run -------------------------------------------------------------------


def _of_the_error(error: BaseException | None) -> list[Problem]:
    if error is None:
        return []
    text = str(error.args[0]) if error.args else type(error).__name__
    if isinstance(error, NeverRanError):
        return [Problem("never-fired", text)]
    slug = error.slug if isinstance(error, TracekitError) else "error"
    return [Problem(slug, text if isinstance(error, TracekitError) else f"{error!r}")]


def _whole(found: Found, checks: list[EditCheck], problems: list[Problem]) -> EditReport:
    comparison = found.comparison
    clocks = [touch.clock for touch in found.touches.every]
    start = min(clocks, default=len(comparison.met) and comparison.met[-1].order + 1)
    front = [met for met in comparison.met if met.order < start]
    behind = [met for met in comparison.met if met.order >= start and not met.is_touched]
    changed = [met.change for met in front if met.change is not None]
    is_same = found.bare is None or found.clean is None or torch.equal(found.bare, found.clean)
    if changed and is_same:
        text = f"{changed[0].site}, which comes before every edit, is not as in the clean run."
        problems.append(Problem("changed-before", text))
    rows = tuple(_rows(found, start))
    for row in rows:
        if row.verdict == "changed":
            text = f"row {row.row} was not edited, and differs by {row.deviation:.3g}."
            problems.append(Problem("other-rows", text))
    report = EditReport(
        tuple(checks),
        (),
        len(front),
        tuple(changed),
        tuple(met.change for met in behind if met.change is not None),
        sum(met.change is None for met in behind),
        rows,
        _logits(found),
        _relative(found.clean, found.result),
        None,
        comparison.grid.tokens(found.tell),
        found.forwards,
        (*found.notes, *_notes(found)),
    )
    return report.with_problems(problems)


def _notes(found: Found) -> Iterator[str]:
    count = found.comparison.clean.without_numbers
    if count:
        yield (
            f"{count} tensors of the clean run were kept as digests, beyond the budget: that they "
            f"differ is known, and not by how much."
        )
    if found.bare is None or found.clean is None or torch.equal(found.bare, found.clean):
        return
    deviation = _relative(found.bare, found.clean)
    yield (
        f"without any hooks the model returns something else, by {deviation:.3g} of its norm: it "
        f"is not deterministic, or computes otherwise (fused) when nobody looks."
    )


def _rows(found: Found, start: int) -> Iterator[RowCheck]:
    grid, met = found.comparison.grid, found.comparison.met
    edited: set[int] = set()
    for touch in found.touches.every:
        mask = grid.spread(touch.is_changed, touch.span)
        offset = touch.span.start if touch.span is not None else 0
        if mask is None:
            edited |= set(range(grid.rows))
        else:
            edited |= {offset + row for row in mask.any(-1).nonzero().flatten().tolist()}
    worst = torch.zeros(grid.rows)
    for each in met:
        if each.rows is not None and each.order >= start:
            worst = torch.maximum(worst, each.rows)
    differing = [each for each in met if each.change is not None and each.order >= start]
    is_known = not differing or any(each.rows is not None for each in differing)
    limit = _tolerance(found)
    tokens = grid.tokens(found.tell)
    for row in range(grid.rows):
        deviation = float(worst[row])
        verdict = "within rounding" if deviation <= limit else "changed"
        verdict = "bit-identical" if not deviation else verdict
        text = "".join(tokens[row]) if row < len(tokens) and found.tell is not None else ""
        verdict = verdict if is_known else "not compared"
        verdict = "edited" if row in edited else verdict
        yield RowCheck(row, _invoke_of(found.touches, row), text, verdict, deviation)


def _invoke_of(touches: Touches, row: int) -> int | None:
    for invoke, span in touches.spans.items():
        if span.start <= row < span.stop:
            return invoke
    return None


def _tolerance(found: Found) -> float:
    dtype = found.result.dtype if found.result is not None else torch.float32
    return TOLERANCES.get(dtype, TOLERANCES[torch.float32])


def _logits(found: Found) -> LogitsChange | None:
    if not found.has_logits or found.clean is None or found.result is None:
        return None
    return change_of_logits(found.clean, found.result, found.comparison.grid, found.tell)


def _relative(clean: Tensor | None, now: Tensor | None) -> float:
    if clean is None or now is None or clean.shape != now.shape:
        return float("nan")
    difference = (now.double() - clean.double()).nan_to_num(0.0).norm()
    size = clean.double().nan_to_num(0.0, 0.0, 0.0).norm()
    return float(difference / size) if size else float(difference)
