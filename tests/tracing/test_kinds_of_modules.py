"""Whatever runs the model and whatever it is made of: the numbers are those of plain hooks."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, is_same, plain_hooks, small, state_of
from tracekit import Model
from tracekit.errors import TracekitWarning


def check(net: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A read, an edit, the result and a cache of every module, against plain hooks."""
    model, before = Model(net), state_of(net)
    path = next(name for name, _ in list(net.named_modules())[1:])
    with plain_hooks(net) as seen:
        plain = net(*args, **kwargs)
    with model.trace(*args, **kwargs) as tracer:
        cache = tracer.cache()
        value = model[path].output.clone()
        result = tracer.result
    assert is_same(value, seen[f"model.{path}"][0])
    assert is_same(result, plain)
    for where in cache:
        assert all(
            is_same(entry.output, one) for entry, one in zip(cache[where], seen[where], strict=True)
        )
    handle = net.get_submodule(path).register_forward_hook(lambda _m, _a, out: out * 0)
    changed = net(*args, **kwargs)
    handle.remove()
    with model.trace(*args, **kwargs) as tracer:
        model[path].output = model[path].output * 0
        result = tracer.result
    assert is_same(result, changed)
    assert state_of(net) == before


STATES: dict[str, Callable[[], Any]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("state", STATES)
def test_a_trace_under_a_state_of_torch_has_the_numbers_of_that_state(state: str) -> None:
    net = small().requires_grad_(False)
    with STATES[state]():
        check(net, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_trace_of_a_model_of_another_type_has_its_numbers(dtype: torch.dtype) -> None:
    check(small().to(dtype).requires_grad_(False), X.to(dtype))


class Float8Linear(nn.Module):
    """Weights in float8, brought back for the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().max() / 448
        self.register_buffer("weight", (linear.weight.detach() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_model_with_weights_in_float8_is_traced() -> None:
    net = nn.Sequential(Float8Linear(nn.Linear(4, 4)), nn.ReLU(), Float8Linear(nn.Linear(4, 4)))
    check(net, X)


def test_values_in_float8_are_read_and_recorded() -> None:
    class ToFloat8(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float8_e4m3fn)

    class Back(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32)

    net = nn.Sequential(nn.Linear(4, 4), ToFloat8(), Back()).requires_grad_(False)
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        value = model[1].output
        model[1].output = torch.zeros(3, 4).to(torch.float8_e4m3fn)
        result = tracer.result
    assert value.dtype is torch.float8_e4m3fn
    assert is_same(value, net[1](net[0](X)))
    assert is_same(cache["model.1"].output, torch.zeros(3, 4).to(torch.float8_e4m3fn))
    assert torch.equal(result, torch.zeros(3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_quantised_by_torch_are_traced() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch was built without fbgemm")
    net = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    check(net, X)


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch_model"])
def test_modules_with_hooks_of_accelerate_are_traced(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    net, inputs = make("gpt2")
    plain = net(**inputs, use_cache=False).logits
    with plain_hooks(net) as seen:
        net(**inputs, use_cache=False)
    if how == "cpu_offload":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(net, {"": "cpu"}, force_hooks=True)
    model, before = Model(net), state_of(net)
    with torch.no_grad(), model.trace(**inputs, use_cache=False) as tracer:
        cache = tracer.cache(modules=model.transformer.h)
        hidden = model.transformer.h[0].mlp.output
        logits = tracer.result.logits
    assert is_same(hidden, seen["model.transformer.h.0.mlp"][0])
    assert is_same(cache["model.transformer.h.1"].output, seen["model.transformer.h.1"][0])
    assert is_same(logits, plain.detach())
    with torch.no_grad(), model.trace(**inputs, use_cache=False) as tracer:
        model.transformer.h[0].skip(model.transformer.h[0].input)
        skipped = tracer.result.logits
    assert not torch.equal(skipped, plain)
    assert state_of(net) == before


def test_a_compiled_model_runs_as_python_under_a_trace() -> None:
    net = small().requires_grad_(False)
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    model = Model(compiled)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with model.trace(X) as tracer:
            value = model._orig_mod[0].output
            model._orig_mod[1].output = torch.ones(3, 4)
            result = tracer.result
        with model.trace() as tracer:
            with tracer.invoke(X[:1]):
                again = getattr(model, "0").output  # as an attribute of the module is reached
            with tracer.invoke(X[1:]):
                model._orig_mod[1].output[:] = 1
                rest = model.output
    assert [warning.category for warning in warned] == [TracekitWarning]
    assert "was compiled by torch" in str(warned[0].message)
    assert [warning.filename for warning in warned] == [__file__]  # once
    assert torch.allclose(again, net[0](X[:1]))
    assert torch.equal(rest, net[2](torch.ones(2, 4)))
    assert torch.equal(value, net[0](X))
    assert torch.equal(result, net[2](torch.ones(3, 4)))
    assert torch.equal(compiled(X), net(X))


def test_a_module_replaced_between_two_traces_is_the_one_that_is_traced() -> None:
    net = small().requires_grad_(False)
    model = Model(net)
    with model.trace(X):
        before = model[1].output
    net[1] = nn.Tanh()
    with model.trace(X):
        after = model[1].output
    assert torch.equal(before, torch.relu(net[0](X)))
    assert torch.equal(after, torch.tanh(net[0](X)))


def test_a_module_in_two_places_has_a_call_for_each() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared).requires_grad_(False)
    model = Model(net)
    with model.trace(X):
        first = model[0].output
        second = model[2].calls[1].output
    assert torch.equal(first, shared(X))
    assert torch.equal(second, net(X))


# -- async functions ------------------------------------------------------------------------------


def test_a_trace_in_an_async_function_between_awaits() -> None:
    net = small().requires_grad_(False)
    model = Model(net)

    async def work() -> list[Tensor]:
        found = []
        for scale in (1.0, 2.0):
            await asyncio.sleep(0)
            with model.trace(X * scale):
                found.append(model[1].output)
            await asyncio.sleep(0)
        return found

    one, two = asyncio.run(work())
    assert torch.equal(one, torch.relu(net[0](X)))
    assert torch.equal(two, torch.relu(net[0](X * 2)))


def test_tasks_that_trace_one_model_in_turns_get_values_of_their_own() -> None:
    net = small().requires_grad_(False)
    model = Model(net)

    async def work(scale: float) -> list[Tensor]:
        found = []
        for _ in range(3):
            with model.trace(X * scale) as tracer:
                model[1].output = model[1].output * scale
                found.append(tracer.result)
            await asyncio.sleep(0)
        return found

    async def together() -> list[list[Tensor]]:
        return await asyncio.gather(*[work(scale) for scale in (1.0, 2.0, 3.0)])

    for scale, found in zip((1.0, 2.0, 3.0), asyncio.run(together()), strict=True):
        expected = net[2](torch.relu(net[0](X * scale)) * scale)
        assert all(torch.equal(one, expected) for one in found)
