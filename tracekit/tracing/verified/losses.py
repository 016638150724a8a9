"""Whether anything that comes after an edit is changed by it."""

# Only where this can be told: nothing differed from the clean run before the edit, and what calls
# the module has returned before the next edit, so that what was written had to be seen somewhere.

from __future__ import annotations

import torch
from torch import Tensor

from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.tracing.sightings import is_same
from tracekit.tracing.touches import Touch, Touches
from tracekit.tracing.verified.comparison import Comparison, Met


def is_lost(
    touch: Touch,
    tree: Tree,
    comparison: Comparison,
    touches: Touches,
    clean: Tensor | None,
    result: Tensor | None,
) -> bool:
    """Whether the edit certainly changed nothing that comes after it."""
    if touch.site.slot is Slot.RESULT or _is_restored(touch, comparison):
        return False
    others = [each for each in touches.every if each.seen != touch.seen]
    following = [each for each in others if each.clock >= touch.clock]
    if any(each.clock < touch.clock for each in others) and _is_dirty(comparison, touch.clock):
        return False
    following.sort(key=lambda each: each.clock)
    stop = following[0].clock if following else None
    window = [met for met in _behind(comparison, touch) if stop is None or met.order < stop]
    if any(met.change is not None for met in window):
        return False
    if following and not _is_as_clean(following[0], comparison):
        return False
    if stop is None and clean is not None and result is not None:
        return is_same(clean, result)
    return _has_returned(touch, tree, window, following)


def _is_dirty(comparison: Comparison, clock: int) -> bool:
    return any(met.change is not None for met in comparison.met if met.order < clock)


def _behind(comparison: Comparison, touch: Touch) -> list[Met]:
    """What came after the value itself."""
    return [met for met in comparison.met if met.order >= touch.clock and met.seen != touch.seen]


def _is_as_clean(touch: Touch, comparison: Comparison) -> bool:
    """Whether a later edit met what the clean run had."""
    kept = comparison.clean.values.get(touch.seen)
    if kept is None or touch.before is None or touch.place >= len(kept):
        return False
    was = kept[touch.place].value
    if was is None or was.shape != touch.before.shape:
        return False
    return is_same(was, touch.before) or bool(torch.equal(was, touch.before))


def _is_restored(touch: Touch, comparison: Comparison) -> bool:
    """Whether the value is what the clean run had, as the edit took an earlier one back."""
    return any(met.seen == touch.seen and met.change is None for met in comparison.met)


def _has_returned(touch: Touch, tree: Tree, window: list[Met], following: list[Touch]) -> bool:
    """Whether what calls the module has returned before the next edit, or with it."""
    path = touch.site.path
    if touch.site.slot is Slot.OUTPUT or path not in tree.called:
        path = path.rpartition(".")[0]
    while path and path not in tree.called:
        path = path.rpartition(".")[0]
    end = Site(path, Slot.OUTPUT)
    is_next = bool(following) and following[0].site == end
    return is_next or any(met.seen.site == end for met in window)
