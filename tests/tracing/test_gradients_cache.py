"""`tracer.cache(include_grads=True)` has the gradients that backward passes bring to outputs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracekit
from tests.tiny_models import make
from tests.tracing.plain import X, small
from tracekit import Cache, Model
from tracekit.errors import CacheError

EVERY = ["gpt2", "llama", "bert", "mixtral", "t5", "vit", "mamba", "gptj", "falcon", "gpt_neox"]


def loss_of(output: Any) -> Tensor:
    return output[0].float().logsumexp(-1).sum()


def gradients_by_hooks(net: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """Every module's gradients of outputs that are tensors, by hand-written tensor hooks."""
    found: dict[str, list[Any]] = {}
    handles: list[Any] = []

    def on_forward(path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            call = len(found.setdefault(path, []))
            found[path].append(None)

            def on_gradient(gradient: Tensor) -> None:
                found[path][call] = gradient.clone()

            output.register_hook(on_gradient)

    for relative, module in net.named_modules():
        path = f"model.{relative}" if relative else "model"
        handles.append(
            module.register_forward_hook(lambda _m, _a, out, path=path: on_forward(path, out))
        )
    loss_of(net(**inputs)).backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", EVERY)
def test_the_gradients_of_every_module_are_those_of_hand_written_hooks(family: str) -> None:
    net, inputs = make(family)
    plain = gradients_by_hooks(net, inputs)
    model = Model(net)
    with model.trace(**inputs) as tracer:
        cache = tracer.cache(include_grads=True)
        result = tracer.result
    loss_of(result).backward()
    compared = 0
    for path, expected in plain.items():
        for entry, gradient in zip(cache[path], expected, strict=True):
            if gradient is None:
                with pytest.raises(CacheError, match="no backward pass has come"):
                    entry.grad
            else:
                assert torch.equal(entry.grad, gradient), path
                compared += 1
    assert compared > 10


def traced(model: Model, **options: Any) -> tuple[Cache, Tensor]:
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True, **options)
        loss = model.output.pow(2).sum()
    return cache, loss


def plain_gradient(net: nn.Module) -> Tensor:
    value = net[0](X)  # pyright: ignore
    return torch.autograd.grad(net[2](net[1](value)).pow(2).sum(), value)[0]  # pyright: ignore


def test_they_are_there_in_the_block_too_once_backward_has_run() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True)
        model.output.pow(2).sum().backward()
    assert torch.equal(cache["model.0"].grad, plain_gradient(model.module))
    assert torch.equal(cache["model.0"].grads[0], cache["model.0"][0].grad)
    assert "grad=Tensor[3, 4] float32 cpu" in repr(cache["model.0"][0])


def test_a_block_with_nothing_but_a_cache_records_them() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True, detach=False)
    cache["model"].output.pow(2).sum().backward()
    assert torch.equal(cache.model[0].grad, plain_gradient(model.module))


def test_before_backward_it_says_what_to_do() -> None:
    cache, _ = traced(Model(small()))
    with pytest.raises(CacheError, match=r"call loss.backward\(\) first"):
        cache["model.0"].grad
    assert "grad=not yet" in repr(cache["model.0"])


def test_without_the_option_it_says_which() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache()
    with pytest.raises(CacheError, match="include_grads=True"):
        cache["model.0"].grad


def test_frozen_parameters_need_a_leaf() -> None:
    net = small().requires_grad_(False)
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True)
        model[1].output.requires_grad_(True)
        loss = model.output.pow(2).sum()
    with pytest.raises(CacheError, match=r"requires_grad_\(True\)"):
        cache["model.0"].grad
    loss.backward()
    value = net[1](net[0](X)).requires_grad_(True)
    expected = torch.autograd.grad(net[2](value).pow(2).sum(), value)[0]
    assert torch.equal(cache["model.1"].grad, expected)


def test_without_grad_there_is_nothing_to_record() -> None:
    model = Model(small())
    with pytest.raises(CacheError, match="computes without grad"):
        with torch.no_grad(), model.trace(X) as tracer:
            tracer.cache(include_grads=True)
    gpt2, inputs = make("gpt2")
    with pytest.raises(CacheError, match="computes without grad"):
        with Model(gpt2).generate(**inputs, max_new_tokens=1) as tracer:
            tracer.cache(include_grads=True)


def test_they_may_be_all_that_is_recorded() -> None:
    model = Model(small())
    cache, loss = traced(model, modules=[model[0]], include_output=False)
    loss.backward()
    assert torch.equal(cache["model.0"].grad, plain_gradient(model.module))
    with pytest.raises(CacheError):
        cache["model.0"].output


def test_with_inputs_too_each_entry_has_its_own() -> None:
    model = Model(small())
    cache, loss = traced(model, include_inputs=True)
    loss.backward()
    assert torch.equal(cache["model.0"].grad, plain_gradient(model.module))
    assert torch.equal(cache["model.0"].input, X)


def test_every_call_of_a_module_has_its_own() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net.append(net[0])
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True)
        loss = model.output.pow(2).sum()
    loss.backward()
    one = net[0](X)
    two = net[0](net[1](one))
    expected = torch.autograd.grad(two.pow(2).sum(), [one, two])
    for entry, gradient in zip(cache["model.0"], expected, strict=True):
        assert torch.equal(entry.grad, gradient)
    with pytest.raises(CacheError, match="a list"):
        cache["model.0"].grad


def test_they_are_moved_and_cast_like_the_rest_and_add_up() -> None:
    model = Model(small())
    cache, loss = traced(model, dtype=torch.float64)
    loss.backward(retain_graph=True)
    once = cache["model.0"].grad
    assert once.dtype is torch.float64
    loss.backward()
    assert torch.equal(cache["model.0"].grad, 2 * once)


def test_they_are_what_the_pass_went_on_with() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True)
        early, late = model[0].output, model[1].output
        with model.output.sum().backward():
            late.grad[:, 0] = 7
            seen = early.grad
    assert (cache["model.1"].grad[:, 0] == 7).all()
    assert torch.equal(cache["model.0"].grad, seen)


def test_they_are_what_the_pass_went_on_with_for_every_output_of_one_operation() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x * 1).chunk(2, -1)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = Halves()

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.halves(x)
            return left * right

    model = Model(Joined())
    with model.trace(X.clone().requires_grad_(True)) as tracer:
        cache = tracer.cache(include_grads=True)
        left, right = model.halves.output
        with model.output.sum().backward():
            left.grad[:] = 3
            right.grad[:] = 5
    of_left, of_right = cache["model.halves"].grad
    assert (of_left == 3).all()
    assert (of_right == 5).all()


def test_a_parameter_that_takes_over_a_gradient_does_not_change_it() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3, 4))
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 1 + self.shift)  # autograd gives both sides one tensor

    model = Model(Shifted())
    with model.trace(X) as tracer:
        cache = tracer.cache(include_grads=True)
        loss = model.output.sum()
    loss.backward()
    model.module.shift.grad += 1
    assert (cache["model.inner"].grad == 1).all()


def test_they_are_pickled_and_copied_with_the_cache() -> None:
    model = Model(small())
    cache, loss = traced(model)
    loss.backward()
    for again in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert torch.equal(again["model.0"].grad, cache["model.0"].grad)


def test_the_graph_holds_no_cache_and_the_cache_no_graph() -> None:
    model = Model(small())
    gc.collect()
    gc.disable()
    try:
        cache, loss = traced(model)
        loss.backward(retain_graph=True)
        awaited = weakref.ref(cache["model.0"][0]._grad)  # pyright: ignore[reportPrivateUsage]
        kept = cache["model.0"].grad
        del cache
        assert awaited() is None
        del loss
        with model.trace(X) as tracer:
            cache = tracer.cache(include_grads=True)
            value = model[1].output
            loss = model.output.pow(2).sum()
        loss.backward(retain_graph=True)
        held_by_the_graph = weakref.ref(value)
        del value
        assert held_by_the_graph() is not None
        del loss
        assert held_by_the_graph() is None
        assert torch.equal(cache["model.0"].grad, kept)
    finally:
        gc.enable()


def test_a_backward_block_beside_a_cache_that_is_read_in_it() -> None:
    model = Model(small())
    cache, loss = traced(model)
    with tracekit.backward(loss):
        pass
    assert torch.equal(cache["model.0"].grad, plain_gradient(model.module))
