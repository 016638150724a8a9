"""The pains of nnsight's users, ranked, each answered by a test here or by a decision.

Answered elsewhere, or decided:
 1, 2, 4, 6   test_silent_wrongness.py
10            a decision: names are stable from 1.0 on, and the page of 0.6 is a test (tests/page)
11            a decision: a loader of our own, tested with the lowest and the newest transformers
 8            rebinding a name is Python; unused keywords go to the model's forward, which refuses
12, 13        test_invokes.py, tests/models/test_inputs.py: values cross blocks, rows are as alone
15            tests/capture/test_forms.py: what can't be lifted stays in place
18            test_gradients.py
21, 23        tests of .source and of lasting edits
24            test_threads.py
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import SPECS, make
from tests.tracing.plain import X, small, state_of
from tracekit import LanguageModel, Model, save
from tracekit.errors import (
    InputError,
    MisfitError,
    NeverRanError,
    OutsideTraceError,
    SiteOrderError,
    StepError,
    TracekitWarning,
    UnknownModuleError,
    UnknownPathError,
)

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def generation() -> tuple[Model, dict[str, Any]]:
    net, inputs = make("gpt2")
    return Model(net), {**SPECS["gpt2"].gen_inputs(inputs), **GREEDY}


def test_03_an_order_error_comes_when_the_model_is_there_and_not_at_the_end() -> None:
    ran: list[str] = []
    net = small()
    net[2].register_forward_hook(lambda *_: ran.append("the last module"))
    model = Model(net)
    with pytest.raises(SiteOrderError, match=r"model\.0\.output.*asked for after model\.1\.output"):
        with model.trace(X):
            model[1].output
            model[0].output
    assert not ran


def test_03_what_never_ran_and_what_was_passed_are_told_apart() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.spare = nn.Linear(4, 4)
    net.forward = lambda x: net[1](net[0](x))  # pyright: ignore
    model = Model(net)
    with pytest.raises(NeverRanError):
        with model.trace(X):
            model.spare.output


def test_05_a_cache_of_a_generation_is_indexed_and_iterated(generation: Any) -> None:
    model, options = generation
    with model.generate(**options) as tracer:
        cache = tracer.cache(modules=model.lm_head)
    entries = cache.model.lm_head
    assert [entry.step for entry in entries] == [0, 1, 2]
    assert entries[-1].output.shape[1] == 1


def test_07_a_value_needs_no_saving_and_saving_it_changes_nothing() -> None:
    model = Model(small())
    with model.trace(X):
        plain = model[0].output
        saved = model[0].output.save()
        also = save(model[0].output)
        first, _ = saved, plain
    assert first is saved
    assert torch.equal(plain, saved)
    assert torch.equal(plain, also)


def test_08_a_trace_that_names_nothing_of_the_model_is_refused() -> None:
    model = Model(small())
    with pytest.raises(UnknownPathError):
        with model.trace(X) as tracer:
            tracer.cache(modules="model.nowhere")
    with pytest.raises(UnknownModuleError):
        with model.trace(X):
            model[0].outputt = X


def test_08_an_argument_that_a_forward_would_swallow_is_noticed() -> None:
    model = LanguageModel("tracekit/tiny")
    with pytest.raises(InputError, match=r"`with model\.generate\(input, max_new_tokens="):
        model.trace("Paris", max_new_tokens=3)
    with pytest.warns(TracekitWarning, match="did you mean output_attentions=") as caught:
        model.trace("Paris", output_attention=True).run(lambda: None)
    assert [warning.filename for warning in caught] == [__file__]


def test_09_the_block_has_the_torch_state_of_the_thread() -> None:
    model = Model(small())
    with torch.inference_mode(), model.trace(X):
        model[0].output
        is_inference = torch.is_inference_mode_enabled()
    assert is_inference
    with torch.autocast("cpu", torch.bfloat16), model.trace(X):
        value = model[0].output
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert value.dtype is product.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 4), torch.zeros(3, 4).double(), (torch.zeros(3, 4),)]
)
def test_14_a_bad_replacement_is_refused_at_its_own_line(value: Any) -> None:
    model = Model(small())
    with pytest.raises(MisfitError) as caught:
        with model.trace(X):
            model[0].output = value
    assert str(caught.traceback[-1].statement).strip() == "model[0].output = value"


def test_16_the_call_of_a_module_is_not_its_step(generation: Any) -> None:
    shared = nn.Linear(4, 4)
    model = Model(nn.Sequential(shared, shared))
    with model.trace(X):
        second = model[0].calls[1].output
    assert torch.equal(second, shared(shared(X)))
    model, options = generation
    with model.generate(**options) as tracer:
        for step in tracer.iter[2]:
            assert step == 2
            logits = model.lm_head.output
    assert logits.shape[1] == 1


def test_17_a_cache_holds_no_model_and_no_kv_cache(generation: Any) -> None:
    model, options = generation
    before = state_of(model.module)
    with model.generate(**options) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert b"GPT2LMHeadModel" not in pickle.dumps(cache)
    assert state_of(model.module) == before


def test_19_an_open_loop_whose_body_asks_for_nothing_ends(generation: Any) -> None:
    model, options = generation
    steps: list[int] = []
    with model.generate(**options) as tracer:
        for step in tracer.iter[:]:
            steps.append(step)
    assert steps == [0, 1, 2]


def test_20_importing_changes_nothing_of_the_process() -> None:
    code = """
import sys, torch
before = (torch.Tensor.backward, torch.Tensor.grad, sys.excepthook, sys.gettrace(), sys.argv[:])
import tracekit; tracekit.Model
after = (torch.Tensor.backward, torch.Tensor.grad, sys.excepthook, sys.gettrace(), sys.argv[:])
assert before == after and not hasattr(object, "save") and not hasattr(torch.Tensor, "save")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_22_a_skip_needs_no_more_than_its_own_call() -> None:
    """Its value is not checked: the module did not run, so there is nothing to compare it with."""
    model = Model(small())
    with model.trace(X) as tracer:
        model[1].skip(model[1].input)
        result = tracer.result
    assert torch.equal(result, model[2](model[0](X)))


def test_25_a_bare_module_takes_a_batch_and_parts_from_outside_the_model() -> None:
    model, outside = Model(small()), nn.Linear(4, 4)
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = model[1].output
            model[1].output = outside(first)
        with tracer.invoke(X[1:]):
            second = tracer.result
    assert first.shape == (1, 4)
    torch.testing.assert_close(second, model.module(X[1:]))


def test_a_step_that_did_not_happen_is_refused(generation: Any) -> None:
    model, options = generation
    with pytest.raises(StepError):
        with model.generate(**options) as tracer:
            tracer.next(7)
            model.lm_head.output


def test_a_value_outside_its_trace_is_refused() -> None:
    with pytest.raises(OutsideTraceError):
        Model(small())[0].output
