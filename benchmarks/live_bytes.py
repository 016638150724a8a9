"""The most memory that is alive while something is made, as torch's own allocator counts it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells when it starts, and when it stops

from torch.profiler import ProfilerActivity, profile


def peak_of(make: Callable[[], Any]) -> tuple[int, Any]:
    """How many bytes of tensors on the CPU were alive at most beyond those before; the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = make()
    results: Any = profiled.profiler.kineto_results
    changes = [each for each in results.events() if each.name() == "[memory]"]
    alive = peak = 0
    for each in sorted(changes, key=lambda each: each.start_ns()):
        alive += each.nbytes()
        peak = max(peak, alive)
    return peak, made
