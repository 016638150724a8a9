"""Run a model with a cache of its activations, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.execution import Execution
from tracekit.tracing.named_cache import NamedCache, keep_of, record_named
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.wanted import Names, wanted


@final
@dataclass(frozen=True)
class Caching:
    """What is recorded, and how."""

    names_filter: Names | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    remove_batch_dim: bool = False
    pos_slice: PosSlice = None
    detach: bool = True
    clone: bool = False


def run_with_cache(
    start: Callable[[TracedCall], Execution], tree: Any, call: TracedCall, caching: Caching
) -> tuple[Any, NamedCache]:
    """What `call` returns, and a cache of the activations of it."""
    results: list[Any] = []

    def kept(follower: Follower | None) -> Any:
        results.append(call.make(follower))
        return results[0]

    spots = wanted(tree, caching.names_filter)
    keep = keep_of(caching.device, caching.dtype, detach=caching.detach, clone=caching.clone)
    execution = start(replace(call, make=kept))
    cache = record_named(execution, tree, spots, keep, caching.pos_slice)
    failure = execution.run([])
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its frames refer to this one
    result = results.pop()
    cache = cache.remove_batch_dim() if caching.remove_batch_dim else cache
    return getattr(result, "logits", result), cache
