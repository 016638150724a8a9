"""What one edit did to one value: rows, positions with their tokens, sizes."""

from __future__ import annotations

from torch import Tensor

from tracekit.tracing.touches import Touch
from tracekit.tracing.verified.comparison import Comparison, narrowed
from tracekit.tracing.verified.grid import Grid, Tell
from tracekit.tracing.verified.report import Landing, Touched


def landing_of(touch: Touch, comparison: Comparison, tell: Tell | None) -> Landing:
    """What it did there, and what became of that."""
    clean = clean_value(touch, comparison)
    if touch.before is None and clean is not None:  # of a module that was skipped
        touch.before = clean
    mask = touch.is_changed
    before = touch.before if touch.before is not None else touch.after.new_zeros(touch.after.shape)
    absolute, largest, norm = _sizes(before, touch.after, clean, mask)
    spread = comparison.grid.spread(mask, touch.span)
    return Landing(
        str(touch.site),
        touch.step,
        touch.seen.call,
        _rows(spread, touch, comparison.grid, tell),
        _features(mask, spread),
        (int(mask.sum()), mask.numel()),
        absolute,
        0.0 if not absolute else absolute / norm if norm else float("inf"),
        largest,
        touch.is_there,
        tuple(dict.fromkeys(touch.read_by)),
        touch.in_cache,
        touch.overwritten_by,
        touch.changed_again_by,
    )


def clean_value(touch: Touch, comparison: Comparison) -> Tensor | None:
    """What the clean run had there, for the rows that the edit was given."""
    kept = comparison.clean.values.get(touch.seen)
    if kept is None or touch.place >= len(kept):
        return None
    value = kept[touch.place].value
    value = None if value is None else narrowed(value, touch.span, touch.after)
    return value if value is not None and value.shape == touch.after.shape else None


def _sizes(
    before: Tensor, after: Tensor, clean: Tensor | None, mask: Tensor
) -> tuple[float, float, float]:
    """Of the change: its norm, its largest element; and the norm of what was there."""
    if before.shape != after.shape or after.is_complex() or not bool(mask.any()):
        return 0.0, 0.0, 0.0
    change = (after[mask].double() - before[mask].double()).abs()
    was = (before if clean is None else clean)[mask].double()
    return float(change.norm()), float(change.max()), float(was.norm())


def _rows(
    spread: Tensor | None, touch: Touch, grid: Grid, tell: Tell | None
) -> tuple[Touched, ...]:
    if spread is None:
        return ()
    offset = touch.span.start if touch.span is not None else 0
    tokens = grid.tokens(tell)
    found: list[Touched] = []
    for place in spread.any(-1).nonzero().flatten().tolist():
        row = offset + place
        own = grid.own_positions(spread.shape[1], row)
        if own is None or spread.shape[1] == 1:
            is_one = own is not None and spread.shape[1] == grid.sequences[0].length
            if not is_one:
                found.append(Touched(row, None, None))
                continue
        assert own is not None
        positions = [int(each) for each in own[spread[place]]]
        texts = tokens[row] if row < len(tokens) else ()
        shown = tuple(texts[each] if 0 <= each < len(texts) else "" for each in positions)
        found.append(Touched(row, tuple(positions), shown))
    return tuple(found)


def _features(mask: Tensor, spread: Tensor | None) -> tuple[int, int] | None:
    """How many of the last axis, where that counts features."""
    if mask.dim() < 2 or (spread is not None and mask.shape == spread.shape):
        return None
    return int(mask.flatten(0, -2).any(0).sum()), mask.shape[-1]
