"""Hold what a cache recorded against what the edits of its run wrote."""

from __future__ import annotations

from torch import Tensor

from tracekit.core.nest import named_tensors
from tracekit.core.site import Slot
from tracekit.interleave.duties import Span
from tracekit.tracing.cache import Cache
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.touches import Touch, Touches


def see_cache(touches: Touches, cache: Cache, span: Span | None) -> None:
    """Note of each touch whether the entry of its visit is what was written."""
    for touch in touches.every:
        if touch.site.path not in cache or touch.overwritten_by or touch.changed_again_by:
            continue
        entries = list(cache[touch.site.path])
        if touch.seen.call < len(entries) and span == touch.span:
            is_there = _is_in(entries[touch.seen.call], touch)
            touch.in_cache = touch.in_cache if is_there is None else is_there


def _is_in(entry: Entry, touch: Touch) -> bool | None:
    value = entry._inputs if touch.site.slot is Slot.INPUT else entry._output  # pyright: ignore[reportPrivateUsage] - the same house
    if value is ABSENT:
        return None
    found = dict(named_tensors(value)).get(touch.leaf)
    if not isinstance(found, Tensor) or found.shape != touch.after.shape:
        return None
    mask = touch.is_changed
    written = touch.after.to(found.dtype)[mask]
    now = found.detach().cpu()[mask]
    return bool(((now == written) | (now.isnan() & written.isnan())).all())
