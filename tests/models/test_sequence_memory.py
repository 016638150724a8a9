"""What is alive while a sequence is put together: its steps, and one copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.tiny_models import make
from tracekit import Cache, Model

IDS = torch.arange(3, 15).reshape(2, 6)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no kv_cache": {"use_cache": False},
    "beams": {"num_beams": 4},
    "many sequences of beams": {"num_beams": 4, "num_return_sequences": 3},
}


def most_alive(make_it: Callable[[], Any]) -> int:
    """How many bytes torch had at most, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = make_it()
    del kept
    results: Any = profiled.profiler.kineto_results
    changes = [each for each in results.events() if each.name() == "[memory]"]
    alive, most = 0, 0
    for each in sorted(changes, key=lambda each: each.start_ns()):
        alive += each.nbytes()
        most = max(most, alive)
    return most


def captured(way: str) -> Cache:
    model = Model(make("gpt2", n_embd=512)[0])
    options = {"max_new_tokens": 8, "do_sample": False, **WAYS[way]}
    with model.generate(IDS, attention_mask=torch.ones_like(IDS), **options) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[1]])
    return cache


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_is_one_copy_beside_its_steps(way: str) -> None:
    cache = captured(way)
    size = cache.sequence("model.transformer.h.1").nbytes

    def two_copies() -> Tensor:
        return cache.sequence("model.transformer.h.1").as_subclass(Tensor) + 0

    assert most_alive(lambda: cache.sequence("model.transformer.h.1")) < 1.1 * size
    assert most_alive(two_copies) > 1.9 * size  # a second one would be seen
