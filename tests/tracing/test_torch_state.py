"""Inside the block torch's state is the user's, and what the block does to it stays there."""

from __future__ import annotations

import contextvars
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tracing.plain import X, small
from tracekit import Model

pytestmark = pytest.mark.usefixtures("each_way")


class Telling(nn.Module):
    """Remembers the state that its forward ran under."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.seen = state()
        return value


class CountingFunctions(TorchFunctionMode):
    """Counts torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sums += func is torch.sum
        return func(*args, **(kwargs or {}))


class CountingOperations(TorchDispatchMode):
    """Counts dispatched operations."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sums += "sum" in str(func)
        return func(*args, **(kwargs or {}))


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.empty(0).device.type,
        VARIABLE.get(),
    )


class DefaultDtype:
    """torch.set_default_dtype as a context."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "default device": lambda: torch.device("meta"),
    "default dtype": DefaultDtype,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_block_and_the_model_run_under_the_users_state(name: str) -> None:
    telling = Telling()
    model = Model(nn.Sequential(telling, nn.Identity()))
    VARIABLE.set(name)
    with CONTEXTS[name]():
        outside = state()
        with model.trace(X):
            first = state()
            model[0].output
            second = state()
        after = state()
    assert first == second == telling.seen == outside == after


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "default dtype"])
def test_a_state_that_the_block_enters_lasts_across_reads_and_is_not_the_models(name: str) -> None:
    telling = Telling()
    model = Model(nn.Sequential(nn.Identity(), telling, nn.Identity()))
    outside = state()
    seen = []
    with model.trace(X):
        model[0].output
        with CONTEXTS[name]():
            inside = state()
            model[1].output
            seen.append(state())
            model[2].output
            seen.append(state())
        last = state()
    assert seen == [inside, inside]
    assert telling.seen == outside == last == state()


def test_values_computed_in_the_block_without_gradients_leave_the_models_graph_whole() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        with torch.no_grad():
            twice = model[0].output * 2
            model[1].output.mean()
        result = tracer.result
    assert not twice.requires_grad
    result.sum().backward()
    got = net[0].weight.grad.clone()
    net.zero_grad()
    net(X).sum().backward()
    assert torch.equal(got, net[0].weight.grad)


def test_gradients_flow_through_edits() -> None:
    net = small()
    model = Model(net)
    scale = torch.tensor(2.0, requires_grad=True)
    with model.trace(X) as tracer:
        model[0].output = model[0].output * scale
        loss = tracer.result.sum()
    loss.backward()
    other = torch.tensor(2.0, requires_grad=True)
    net[2](net[1](net[0](X) * other)).sum().backward()
    assert torch.equal(scale.grad, other.grad)


def test_a_read_value_keeps_its_gradient() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        value = model[1].output
        value.retain_grad()
        loss = tracer.result.sum()
        loss.backward()
    assert torch.equal(value.grad, net[2].weight.sum(0).expand(3, 4))


@pytest.mark.parametrize("kind", [CountingFunctions, CountingOperations])
def test_the_users_modes_see_what_the_block_computes(kind: Any) -> None:
    model = Model(small())
    with kind() as mode:
        with model.trace(X):
            torch.sum(model[0].output)
            torch.sum(model[1].output)
        inside = mode.sums
        torch.sum(X)
    assert (inside, mode.sums) == (2, 3)


def test_a_trace_under_fake_tensors_computes_nothing() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Model(small())
        with model.trace(torch.zeros(3, 4)) as tracer:
            own = torch.zeros(2)
            value = model[0].output
            result = tracer.result
    assert all(isinstance(tensor, FakeTensor) for tensor in (own, value, result))


def test_a_context_variable_set_in_the_block_is_kept_across_reads() -> None:
    model = Model(small())
    VARIABLE.set("outside")
    with model.trace(X):
        VARIABLE.set("inside")
        model[0].output
        seen = VARIABLE.get()
    assert seen == "inside"


def test_a_random_number_in_the_block_comes_from_the_users_seed() -> None:
    model = Model(small())
    torch.manual_seed(3)
    with model.trace(X):
        model[0].output
        got = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(got, torch.rand(2))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["in the block", "after it"])
def test_gradients_of_an_edit_are_right_under_gradient_checkpointing_or_refused(
    reentrant: bool, where: str
) -> None:
    from tests.tiny_models import make
    from tracekit import TracekitError

    gradients = []
    for checkpoints in (False, True):
        module, inputs = make("llama")
        module.train()
        if checkpoints:
            module.gradient_checkpointing_enable({"use_reentrant": reentrant})
            module.enable_input_require_grads()
        model = Model(module)
        projection = model.model.layers[0].self_attn.o_proj
        try:
            with model.trace(**inputs, use_cache=False) as tracer:
                projection.output = projection.output * 2
                loss = tracer.result.logits.logsumexp(-1).sum()
                if where == "in the block":
                    loss.backward()
            if where == "after it":
                loss.backward()
        except TracekitError:
            assert checkpoints
            return
        gradients.append(module.model.embed_tokens.weight.grad)
    assert torch.allclose(*gradients, atol=1e-5)
