"""Each case where other tracers are silently wrong: here it is right, or refused.

The first part are those of nnsight 0.8.1, the second those of TransformerLens 4.3 as far as they
are about traces and caches.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import SPECS, generate, make
from tests.tracing.plain import X, changing, is_same, plain_hooks, small, state_of
from tracekit import LanguageModel, Model
from tracekit.errors import OverwrittenError, TracekitError, UnknownPathError

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- nnsight --------------------------------------------------------------------------------------


def test_captured_values_that_alias_tensors_the_model_overwrites_in_place() -> None:
    net = small(nn.ReLU(inplace=True))
    model = Model(net)
    plain = net[0](X)
    with pytest.raises(OverwrittenError):
        with model.trace(X):
            value = model[0].output
    with model.trace(X) as tracer:
        cache = tracer.cache()
        value = model[0].output.clone()
    assert torch.equal(value, plain)
    assert torch.equal(cache["model.0"].output, plain)


def test_nonlocal_writes_in_a_block() -> None:
    model = Model(small())
    count = 0

    def work() -> None:
        nonlocal count
        with model.trace(X):
            model[0].output
            count += 1

    work()
    work()
    assert count == 2


def test_an_edit_of_output_0_on_a_batch_edits_row_0_and_hidden_edits_them_all() -> None:
    """`.output` is what the module returned: [0] of a tensor is a row. `.hidden` is the tensor."""
    net, inputs = make("gpt2")
    model = Model(net)
    layer = net.get_submodule("transformer.h.0")
    with changing(layer, lambda out: torch.zeros_like(out)):
        expected = net(**inputs, use_cache=False).logits
    with model.trace(**inputs, use_cache=False) as tracer:
        model.transformer.h[0].hidden[:] = 0
        logits = tracer.result.logits
    assert inputs["input_ids"].shape[0] > 1
    assert torch.equal(logits, expected)


class SkipsAStep(nn.Module):
    """Calls its inner module in every second forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls_so_far = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls_so_far += 1
        return x if self.calls_so_far % 2 else self.inner(x)


def test_steps_1_to_3_of_a_module_that_skips_a_step() -> None:
    net, inputs = make("gpt2")
    net.lm_head = nn.Sequential(net.lm_head, SkipsAStep(nn.Identity()))  # pyright: ignore
    model = Model(net)
    options = {**SPECS["gpt2"].gen_inputs(inputs), **GREEDY}
    with model.generate(**options) as tracer:
        cache = tracer.cache(modules=model.lm_head[1].inner)
    assert [entry.step for entry in cache["model.lm_head.1.inner"]] == [1]
    net.lm_head[1].calls_so_far = 0  # pyright: ignore
    steps: list[int] = []
    values: list[Tensor] = []
    with model.generate(**options) as tracer:
        for step in tracer.iter[1:3]:
            steps.append(step)
            values.append(model.lm_head[0].output)
            if step == 1:
                inner = model.lm_head[1].inner.output
    assert steps == [1, 2]
    assert torch.equal(inner, values[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_gpt2_in_a_padded_batch(side: str) -> None:
    model = LanguageModel("tracekit/tiny", padding_side=side)
    prompts = ["The Eiffel Tower is in the city of", "The Colosseum is in"]
    with model.trace(prompts):
        logits = model.lm_head.output
    for row, prompt in enumerate(prompts):
        with model.trace(prompt):
            alone = model.lm_head.output
        length = alone.shape[1]
        part = logits[row, -length:] if side == "left" else logits[row, :length]
        torch.testing.assert_close(part, alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["stop", "backward"])
def test_traces_with_backward_or_stop_that_stay_alive(way: str) -> None:
    net = small()
    model = Model(net)

    def work() -> weakref.ref[Tensor]:
        with torch.enable_grad(), model.trace(X) as tracer:
            value = model[0].output.clone()
            if way == "backward":
                tracer.result.sum().backward()
            else:
                tracer.stop()
        return weakref.ref(value)

    gc.disable()
    try:
        assert work()() is None
    finally:
        gc.enable()


def test_values_moved_by_a_cache_are_whole() -> None:
    """`non_blocking` copies that nobody waits for; a cache moves what it records at once."""
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache(device="cpu", dtype=torch.float64)
    assert torch.equal(cache["model.0"].output, model[0](X).double())


def test_the_output_on_a_cache_is_a_value_or_a_list_depending_on_the_count() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    options = SPECS["gpt2"].gen_inputs(inputs)
    kinds = set()
    for count in (1, 3):
        with model.generate(**options, max_new_tokens=count, do_sample=False) as tracer:
            cache = tracer.cache(modules=model.lm_head)
        entries = cache["model.lm_head"]
        kinds.add(type(entries))
        assert len(entries) == len(entries.outputs) == count
        if count > 1:
            with pytest.raises(TracekitError):
                entries.output
    assert len(kinds) == 1


def test_code_after_an_open_loop_runs() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    steps, has_run = 0, False
    with model.generate(**SPECS["gpt2"].gen_inputs(inputs), **GREEDY) as tracer:
        for _ in tracer.iter[:]:
            model.lm_head.output
            steps += 1
        has_run = True
        tokens = tracer.result
    assert has_run
    assert steps == 3
    assert torch.equal(tokens, generate("gpt2", net, inputs))


def test_a_body_that_reads_a_later_module_first_gets_no_value_of_the_next_step() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    with pytest.raises(TracekitError, match="asked for after"):
        with model.generate(**SPECS["gpt2"].gen_inputs(inputs), **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                model.lm_head.output
                model.transformer.h[0].output


def test_a_patched_activation_is_not_overwritten_by_the_run_that_it_is_patched_into() -> None:
    net = small(nn.ReLU(inplace=True))
    model = Model(net)
    with model.trace(X):
        clean = model[0].output.clone()
    kept = clean.clone()
    for _ in range(3):
        with model.trace(X * 2) as tracer:
            model[0].hidden = clean
            result = tracer.result
        assert torch.equal(clean, kept)
        assert torch.equal(result, net(X))


# -- TransformerLens ------------------------------------------------------------------------------


def test_the_models_own_modules_are_kept_and_give_the_same_bits() -> None:
    net, inputs = make("llama")
    modules = list(net.modules())
    before, plain = state_of(net), net(**inputs, use_cache=False).logits
    model = Model(net)
    with model.trace(**inputs, use_cache=False) as tracer:
        tracer.cache()
        logits = tracer.result.logits
    assert [id(module) for module in net.modules()] == [id(module) for module in modules]
    assert torch.equal(logits, plain)
    assert state_of(net) == before


def test_generate_takes_every_option() -> None:
    net, inputs = make("gpt2")
    options = {**SPECS["gpt2"].gen_inputs(inputs), **GREEDY, "num_beams": 2}
    with Model(net).generate(**options) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, net.generate(**options))  # pyright: ignore


def test_a_misspelled_name_in_a_list_is_refused() -> None:
    model = Model(small())
    with pytest.raises(UnknownPathError):
        with model.trace(X) as tracer:
            tracer.cache(modules=["model.0", "model.9"])


def test_recorded_tensors_share_no_memory_that_is_written_later() -> None:
    net = small(nn.ReLU(inplace=True))
    model = Model(net)
    with plain_hooks(net) as seen:
        net(X)
    with model.trace(X) as tracer:
        cache = tracer.cache()
    for path in cache:
        assert is_same(cache[path].output, seen[path][0])


def test_a_capture_under_an_edit_is_the_capture_of_that_run() -> None:
    net = small()
    model = Model(net)
    with changing(net[0], lambda out: out * 2), plain_hooks(net) as seen:
        net(X)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[0].output = model[0].output * 2
    assert all(is_same(cache[path].output, seen[path][0]) for path in cache)


def test_an_encoder_runs_once_in_a_generation() -> None:
    net, inputs = make("t5")
    model = Model(net)
    with model.generate(**SPECS["t5"].gen_inputs(inputs), **GREEDY) as tracer:
        cache = tracer.cache(modules=[model.encoder, model.decoder])
    assert [entry.step for entry in cache["model.encoder"]] == [0]
    assert [entry.step for entry in cache["model.decoder"]] == [0, 1, 2]


def test_skipped_modules_do_not_run() -> None:
    runs: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Any) -> Any:
            runs.append(1)
            return x

    model = Model(nn.Sequential(Counted(), nn.Linear(4, 4)))
    with model.trace(X) as tracer:
        model[0].skip(X * 2)
        result = tracer.result
    assert not runs
    assert torch.equal(result, model[1](X * 2))
