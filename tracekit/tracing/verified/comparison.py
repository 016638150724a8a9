"""The run with edits held against the run without, value by value, as each comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tracekit.core.nest import named_tensors, tensors
from tracekit.core.site import Site, Slot
from tracekit.interleave.duties import Span
from tracekit.tracing.sightings import Clean, Kept, Seen, is_same
from tracekit.tracing.touches import Touch, Touches
from tracekit.tracing.verified.grid import Grid
from tracekit.tracing.verified.report import ModuleChange
from tracekit.tracing.verified.succession import told_by, writes_over


@final
@dataclass(frozen=True)
class Met:
    """A value of the run with edits, beside that of the run without."""

    order: int
    seen: Seen
    change: ModuleChange | None  # None: every bit is the same
    # `[rows]`: the largest difference in each, over the largest clean value; None: it has no rows
    rows: Tensor | None
    is_touched: bool


@final
class Comparison:
    """Sees the run with edits, and knows the one without."""

    def __init__(self, clean: Clean, grid: Grid, touches: Touches) -> None:
        self.met: list[Met] = []
        self.clean = clean
        self.grid = grid
        self.counts: Counter[Site] = touches.counts
        self._touches = touches
        self._written: list[tuple[Touch, Kept, Tensor]] = []  # and who reads it

    def see(self, order: int, seen: Seen, value: Any) -> None:
        """A value has come, as the model goes on with it."""
        self._touches.clock = order + 1
        touches = self._touches.arrived(seen)
        known = self.clean.values.get(seen)
        if touches:
            self._land(touches, value, known)
        if known is None:
            if touches:
                self.met.append(Met(order, seen, None, None, True))
            return
        now = list(tensors(value))
        if seen.site.slot is Slot.INPUT and self._written and not touches:
            self._read(seen, now, known)
        self.met.append(self._meet(order, seen, now, known, bool(touches)))

    # -- what was written -----------------------------------------------------------------------

    def _land(self, touches: Sequence[Touch], value: Any, known: list[Kept] | None) -> None:
        """Whether what was written is what the model goes on with; who overwrote it, if not."""
        whole = dict(named_tensors(value))
        for touch in touches:
            now = whole.get(touch.leaf)
            if now is None:
                touch.is_there = False
                continue
            now = now.detach().cpu()
            later = [each for each in touches if each.order > touch.order]
            _settle(touch, now, [each for each in later if each.leaf == touch.leaf])
            is_read = touch.site.slot is Slot.OUTPUT and known is not None
            if is_read and known is not None and touch.place < len(known):
                self._written.append((touch, known[touch.place], now.clone()))

    def _read(self, seen: Seen, now: list[Tensor], known: list[Kept]) -> None:
        """Who was given, in the clean run, the very tensor that was edited: is it given the new?"""
        for touch, was, written in self._written:
            for tensor, kept in zip(now, known, strict=False):
                if kept is was and is_same(tensor.detach().cpu(), written):
                    touch.read_by.append(seen.site.path)
                elif kept is was and kept.is_same(tensor):
                    touch.not_read_by.append(seen.site.path)

    # -- what became of all else ----------------------------------------------------------------

    def _meet(
        self, order: int, seen: Seen, now: list[Tensor], known: list[Kept], is_touched: bool
    ) -> Met:
        pairs = zip(now, known, strict=False)
        apart = [(tensor, kept) for tensor, kept in pairs if not kept.is_same(tensor)]
        if not apart and len(now) == len(known):
            return Met(order, seen, None, None, is_touched)
        rows: Tensor | None = None
        largest, above, below, is_sized = 0.0, 0.0, 0.0, bool(apart)
        for tensor, kept in apart:
            sizes = _sizes(tensor, kept)
            if sizes is None:
                is_sized = False
                continue
            size, clean = sizes
            largest = max(largest, float(size.max()))
            above, below = above + float((size**2).sum()), below + float((clean**2).sum())
            of_rows = self.grid.by_row(size / (float(clean.abs().max()) or 1.0))
            if of_rows is not None:
                rows = of_rows if rows is None else torch.maximum(rows, of_rows)
        change = ModuleChange(
            str(seen.site),
            seen.call,
            order,
            largest if is_sized else None,
            (above**0.5 / below**0.5 if below else float("inf")) if is_sized else None,
            () if rows is None else tuple(rows.nonzero().flatten().tolist()),
        )
        return Met(order, seen, change, rows, is_touched)


def in_whole(touch: Touch, whole: Tensor, part: Tensor) -> Tensor:
    """What is `part` of what an edit was given, in a tensor of the whole batch; else zeros."""
    found = torch.zeros(whole.shape, dtype=part.dtype)
    if part.shape == whole.shape:
        return part
    narrowed(found, touch.span, part)[...] = part
    return found


def narrowed(whole: Tensor, span: Span | None, part: Tensor) -> Tensor:
    """Of a whole, the rows that a block was given, whose part looks like this."""
    if span is None or part.shape == whole.shape:
        return whole
    for axis in range(whole.dim()):
        each, rest = divmod(whole.shape[axis], span.size)
        if not rest and part.shape[axis] == each * (span.stop - span.start) != whole.shape[axis]:
            return whole.narrow(axis, span.start * each, part.shape[axis])
    return whole


def _settle(touch: Touch, now: Tensor, later: list[Touch]) -> None:
    """Whether the elements that were changed are what was written, or what a later edit made."""
    own = narrowed(now, touch.span, touch.after)
    if own.shape != touch.after.shape:
        touch.is_there = False
        return
    mask = touch.is_changed
    off = mask & ~_equal(own, touch.after)
    touch.is_there = not bool(off.any())
    if touch.is_there or not later:
        return
    for each in later:
        theirs = in_whole(each, now, each.is_changed)
        shared = off & narrowed(theirs, touch.span, touch.after)
        if bool(shared.any()):
            is_all = not bool((mask & ~shared).any())
            if is_all and writes_over(each, touch):
                touch.overwritten_by = told_by(each)
            else:
                touch.changed_again_by = told_by(each)
            off = off & ~shared
    touch.is_there = not bool(off.any())


def _equal(one: Tensor, other: Tensor) -> Tensor:
    same = one == other
    return same | (one.isnan() & other.isnan()) if one.is_floating_point() else same


def _sizes(tensor: Tensor, kept: Kept) -> tuple[Tensor, Tensor] | None:
    """The absolute differences, and what was there; None if they can't be told."""
    if kept.value is None or tensor.shape != kept.shape or tensor.is_complex():
        return None
    now, was = tensor.detach().cpu().double(), kept.value.double()
    size = torch.where(now == was, 0.0, (now - was).abs()).nan_to_num(0.0)
    return size, was.nan_to_num(0.0, 0.0, 0.0)
