"""A function in the place of a block, and runs that are said in data."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, changing
from tracekit import LanguageModel, Model, Outcome, Tracer
from tracekit.errors import (
    InputError,
    MisfitError,
    NeverRanError,
    SiteOrderError,
    UnknownPathError,
)

IDS = torch.arange(10, 16).reshape(2, 3)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


# -- a function ------------------------------------------------------------------------------------


def test_a_function_runs_as_a_block_and_its_value_is_returned(
    model: Model, net: nn.Sequential
) -> None:
    def function(tracer: Tracer) -> tuple[Tensor, Tensor]:
        hidden = model[0].output
        model[1].output = hidden * 2
        return hidden, tracer.result

    hidden, result = model.trace(X).run(function)
    assert torch.equal(hidden, net[0](X))
    assert torch.equal(result, net[2](net[0](X) * 2))


def test_a_function_gets_the_tracer_only_if_it_requires_an_argument(
    model: Model, net: nn.Sequential
) -> None:
    tracer = model.trace(X)

    class Probe:
        def method(self, got: Tracer) -> Tensor:
            assert got is tracer
            return model[0].output

    def two(index: int, got: Tracer) -> Tensor:
        assert got is tracer
        return model[index].output

    functions: list[Callable[..., Tensor]] = [
        lambda: model[0].output,
        lambda index=0: model[index].output,
        lambda *args, **kwargs: model[len(args) + len(kwargs)].output,
        Probe().method,
        partial(two, 0),
    ]
    exec("def made(t): return t.cache() and model[0].output", names := {"model": model})
    for function in (*functions, names["made"]):
        assert torch.equal(tracer.run(function), net[0](X))
    assert "a function ran" in tracer.explain().lower()


def test_a_function_may_stop_and_may_make_caches(model: Model, net: nn.Sequential) -> None:
    def stopping(tracer: Tracer) -> Tensor:
        caches.append(tracer.cache())
        model[0].output
        tracer.stop()
        return model[1].output

    caches: list[Any] = []
    assert model.trace(X).run(stopping) is None
    assert list(caches[0]) == ["model.0"]
    assert torch.equal(caches[0]["model.0"].output, net[0](X))


def test_an_error_of_the_function_shows_the_users_lines_alone(model: Model) -> None:
    def late() -> Tensor:
        model[1].output
        return model[0].output

    with pytest.raises(SiteOrderError, match=r"model\.0\.output") as caught:
        model.trace(X).run(late)
    entries = traceback.extract_tb(caught.value.__traceback__)
    assert [entry.line for entry in entries] == [
        "model.trace(X).run(late)",
        "return model[0].output",
    ]
    assert caught.value.__context__ is None


def test_an_error_of_the_model_shows_the_line_of_the_run(model: Model) -> None:
    with pytest.raises(RuntimeError, match="mat1") as caught:
        model.trace(torch.zeros(3, 5)).run(lambda: model[1].output)
    first = traceback.extract_tb(caught.value.__traceback__)[0]
    assert first.filename == __file__


async def a_coroutine() -> None: ...


def a_generator() -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [a_coroutine, a_generator])
def test_a_function_that_a_call_does_not_run_is_refused(
    function: Callable[[], Any], model: Model
) -> None:
    with pytest.raises(InputError, match="generator or coroutine"):
        model.trace(X).run(function)


def test_what_can_not_be_called_so_is_refused_with_the_way_out(model: Model) -> None:
    with pytest.raises(InputError, match=r"needs \(a, b\): .*partial"):
        model.trace(X).run(lambda a, b: a)
    with pytest.raises(InputError, match=r"needs \(b\)"):
        model.trace(X).run(lambda *, b: b)
    with pytest.raises(InputError, match="takes a function, not int"):
        model.trace(X).run(3)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="not both"):
        model.trace(X).run(lambda: 1, capture="*")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="this trace has one"):
        with model.trace(X) as tracer:
            tracer.run(lambda: 1)
    with pytest.raises(InputError, match="a trace of invokes needs one"):
        model.trace().run(lambda: 1)


def test_a_function_beside_a_generation() -> None:
    llama = make("llama")[0]
    model = Model(llama)

    def function(tracer: Tracer) -> tuple[Tensor, Any]:
        read = [model.lm_head.output[:, -1].argmax(-1) for _ in tracer.iter[:]]
        return torch.stack(read, 1), tracer.result

    tokens, result = model.generation(IDS, **GREEDY).run(function)
    assert torch.equal(result, llama.generate(IDS, **GREEDY))
    assert torch.equal(tokens, result[:, -3:])


def test_the_tracer_of_a_generation_in_an_exit_stack() -> None:
    model = LanguageModel("tracekit/tiny")
    plain = model.generate("The Eiffel Tower is in", max_new_tokens=2)
    with ExitStack() as stack:
        tracer = stack.enter_context(model.generation("The Eiffel Tower is in", max_new_tokens=2))
        first = model.lm_head.output[0, -1].argmax()
        tokens = tracer.result
    assert torch.equal(tokens, plain)
    assert first == plain[0, -2]


def test_a_model_that_does_not_generate_says_so(model: Model) -> None:
    with pytest.raises(InputError, match=r"Sequential has no generate"):
        model.generation(X)


# -- said in data ----------------------------------------------------------------------------------


def test_a_declared_run_captures_and_edits_in_any_order(model: Model, net: nn.Sequential) -> None:
    outcome = model.run(
        X,
        capture=[model[0], "2"],
        edits=[
            (model[1], torch.ones(3, 4)),
            ("0", lambda hidden: hidden * 3),
            ("0", lambda hidden: hidden.add_(1).sum() and None),
        ],
    )
    assert isinstance(outcome, Outcome)
    assert list(outcome.cache) == ["model.0", "model.2"]
    assert torch.equal(outcome.cache["0"].output, net[0](X) * 3 + 1)
    assert torch.equal(outcome.result, net[2](torch.ones(3, 4)))


def test_a_number_is_written_everywhere(model: Model, net: nn.Sequential) -> None:
    assert torch.equal(model.run(X, edits=[("1", 0)]).result, net[2](torch.zeros(3, 4)))


def test_nothing_is_captured_unless_it_is_named(model: Model, net: nn.Sequential) -> None:
    outcome = model.run(X)
    assert len(outcome.cache) == 0
    assert torch.equal(outcome.result, net(X))
    assert len(model.run(X, capture="*").cache) == 4


def test_edits_reach_the_hidden_state_in_whatever_the_family_returns() -> None:
    gpt2 = make("gpt2")[0]
    model = Model(gpt2)
    outcome = model.run(IDS, capture="transformer.h.0.attn", edits=[("transformer.h.*.attn", 0)])

    def zeroed(output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    with changing(gpt2.transformer.h[0].attn, zeroed), changing(gpt2.transformer.h[1].attn, zeroed):
        expected = gpt2(IDS).logits
    assert torch.equal(outcome.result.logits, expected)
    assert not outcome.cache["transformer.h.0.attn"].hidden.any()


def test_a_declared_generation_edits_every_step() -> None:
    llama = make("llama")[0]
    model = Model(llama)
    outcome = model.generation(IDS, **GREEDY).run(
        capture=model.model.layers[1], edits=[("model.layers.0", lambda hidden: hidden * 2)]
    )
    with changing(llama.model.layers[0], lambda output: output * 2):
        expected = llama.generate(IDS, **GREEDY)
    assert torch.equal(outcome.result, expected)
    assert len(outcome.cache["model.layers.1"]) == 3


def test_an_edit_that_is_never_made_is_an_error(net: nn.Sequential) -> None:
    net.register_module("spare", nn.Identity())
    net.forward = lambda value: net[1](net[0](value))
    model = Model(net)
    with pytest.raises(NeverRanError, match="spare"):
        model.run(X, edits=[("spare", 0)])
    with pytest.raises(NeverRanError, match=r"the edit of 'sp\*' was not made"):
        model.run(X, edits=[("sp*", 0)])
    assert torch.equal(model.run(X, edits=[("[1s]*", 0)]).result, torch.zeros(3, 4))


def test_unknown_modules_are_refused_before_anything_runs(model: Model, net: nn.Sequential) -> None:
    ran: list[Any] = []
    handle = net.register_forward_pre_hook(lambda *args: ran.append(args))
    for options in (
        {"edits": [("3", 0)]},
        {"capture": ["3"]},
        {"edits": [(model[0], 0), ("x", 0)]},
    ):
        with pytest.raises(UnknownPathError, match="is not a module of Sequential"):
            model.run(X, **options)
    handle.remove()
    assert ran == []


@pytest.mark.parametrize("edit", ["0", ("0",), ("0", "zero"), 3, ("0", None)])
def test_what_is_no_edit_is_refused(edit: Any, model: Model) -> None:
    with pytest.raises(InputError, match=r"edits= takes pairs .* not "):
        model.run(X, edits=[edit])


def test_a_value_that_does_not_fit_is_refused_at_the_users_line(model: Model) -> None:
    with pytest.raises(MisfitError, match=r"model\.1\.output") as caught:
        model.run(X, edits=[(model[1], torch.ones(2))])
    entries = traceback.extract_tb(caught.value.__traceback__)
    assert [entry.filename for entry in entries] == [__file__]


def test_an_error_in_a_change_shows_its_line(model: Model) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        model.run(X, edits=[("1", lambda hidden: hidden / (1 // 0))])
    entries = traceback.extract_tb(caught.value.__traceback__)
    assert [entry.filename for entry in entries] == [__file__] * 2


def test_an_outcome_is_shown_by_shapes(model: Model) -> None:
    shown = repr(model.run(X, capture=["1"]))
    assert shown.startswith("Outcome(result=Tensor[3, 4] float32 cpu, cache=Cache(1 modules")
