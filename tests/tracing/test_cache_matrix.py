"""tracer.cache() equals plain hooks, bit for bit, on every architecture of the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import NAMES, SPECS, generate, make
from tests.tracing.plain import is_same, plain_hooks
from tracekit import Cache, Entry, Model

GENERATING = [name for name in NAMES if SPECS[name].generate]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def assert_equal(cache: Cache, seen: dict[str, list[Any]], slot: str = "output") -> None:
    assert list(cache) == list(seen)
    for path, values in seen.items():
        assert len(cache[path]) == len(values), path
        for entry, value in zip(cache[path], values, strict=True):
            assert is_same(getattr(entry, slot), value), f"{path} {entry}"


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_holds_what_plain_hooks_see(name: str) -> None:
    model, inputs = make(name)
    with plain_hooks(model) as seen:
        model(**inputs)
    traced = Model(model)
    for _ in range(2):  # the first recording copies; the second shares what is not overwritten
        with traced.trace(**inputs) as tracer:
            cache = tracer.cache()
        assert_equal(cache, seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_beside_a_block_that_reads_holds_the_same(name: str) -> None:
    model, inputs = make(name)
    with plain_hooks(model) as seen:
        model(**inputs)
    traced = Model(model)
    first = next(iter(seen))
    for _ in range(2):
        with traced.trace(**inputs) as tracer:
            cache = tracer.cache()
            getattr(tracer, "result")  # noqa: B009 - the block waits on a worker for it
        assert_equal(cache, seen)
        assert len(cache[first]) == len(seen[first])


@pytest.mark.parametrize("name", NAMES)
def test_cached_inputs_are_what_plain_pre_hooks_see(name: str) -> None:
    model, inputs = make(name)
    with plain_hooks(model, inputs=True) as seen:
        model(**inputs)
    traced = Model(model)
    for _ in range(2):
        with traced.trace(**inputs) as tracer:
            cache = tracer.cache(include_inputs=True, include_output=False)
        assert list(cache) == list(seen)
        for path, values in seen.items():
            for entry, (args, kwargs) in zip(cache[path], values, strict=True):
                assert is_same(list(entry.inputs[0]), args), f"{path} {entry}"
                assert is_same(entry.inputs[1], kwargs), f"{path} {entry}"


@pytest.mark.parametrize("name", GENERATING)
def test_a_cache_of_a_generation_holds_what_plain_hooks_see_step_by_step(name: str) -> None:
    model, inputs = make(name)
    with plain_hooks(model) as seen:
        tokens = generate(name, model, inputs)
    traced = Model(model)
    options = {**SPECS[name].gen_inputs(inputs), **GREEDY, **SPECS[name].generation}
    for _ in range(2):
        with traced.generate(**options) as tracer:
            cache = tracer.cache()
            result = tracer.result
        assert torch.equal(result, tokens)
        assert_equal(cache, seen)


@pytest.mark.parametrize("name", GENERATING)
def test_the_steps_of_entries_are_decoding_iterations(name: str) -> None:
    model, inputs = make(name)
    traced = Model(model)
    options = {**SPECS[name].gen_inputs(inputs), **GREEDY, **SPECS[name].generation}
    with traced.generate(**options) as tracer:
        cache = tracer.cache()
    entries: list[Entry] = [entry for path in cache for entry in cache[path]]
    assert {entry.step for entry in entries} == {0, 1, 2}
    for path in cache:
        steps = [entry.step for entry in cache[path]]
        assert steps == sorted(steps)
