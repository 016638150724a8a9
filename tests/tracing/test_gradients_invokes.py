"""Gradients where several inputs share one forward pass: each block has those of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tracekit
from tests.tiny_models import make
from tests.tracing.plain import X, small
from tracekit import LanguageModel, Model

PROMPTS = ["The Eiffel Tower is in the city of", "The Colosseum is in", "A movie"]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def loss_of(logits: Tensor) -> Tensor:
    return logits[:, -1].logsumexp(-1).sum()


def alone(model: LanguageModel, prompt: str) -> tuple[Tensor, ...]:
    """The gradients of each block's output, of one prompt in a plain run."""
    seen: list[Tensor] = []
    handles: list[Any] = [
        block.module.register_forward_hook(lambda _m, _a, output: seen.append(output))
        for block in model.transformer.h
    ]
    logits = model.module(**model.tokenizer(prompt, return_tensors="pt")).logits
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(loss_of(logits), seen)


def close(rows: Tensor, plain: Tensor) -> bool:
    return torch.allclose(rows[:, -plain.shape[1] :], plain, atol=2e-5)


def test_each_block_reads_the_gradients_that_its_input_gives_alone(tiny: LanguageModel) -> None:
    found: dict[int, list[Tensor]] = {}
    with tiny.trace() as tracer:
        for i, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                hidden = [block.output for block in tiny.transformer.h]
                loss = loss_of(tiny.lm_head.output)
                with loss.backward(retain_graph=i < len(PROMPTS) - 1):
                    found[i] = [value.grad for value in reversed(hidden)]
    for i, prompt in enumerate(PROMPTS):
        for gradient, plain in zip(reversed(found[i]), alone(tiny, prompt), strict=True):
            assert close(gradient, plain)
            assert gradient.shape[0] == 1


def test_one_pass_for_all_of_them_after_the_trace(tiny: LanguageModel) -> None:
    values: list[Tensor] = []
    losses: list[Tensor] = []
    with tiny.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                values.append(tiny.transformer.h[2].output)
                losses.append(loss_of(tiny.lm_head.output))
        with tracer.invoke():
            whole = tiny.transformer.h[1].output
    with tracekit.backward(torch.stack(losses).sum()):
        found = [value.grad.clone() for value in values]
        of_all = whole.grad
    for i, prompt in enumerate(PROMPTS):
        expected = alone(tiny, prompt)
        assert close(found[i], expected[2])
        assert close(of_all[i : i + 1], expected[1])


def test_a_replaced_gradient_of_one_row_leaves_the_others(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            early, one = tiny.transformer.h[0].output, tiny.transformer.h[2].output
            first = loss_of(tiny.lm_head.output)
        with tracer.invoke(PROMPTS[0]):
            other_early, other = tiny.transformer.h[0].output, tiny.transformer.h[2].output
            second = loss_of(tiny.lm_head.output)
    with tracekit.backward(first + second):
        one.grad = torch.zeros_like(one)
        other.grad *= 2
        of_one, of_other = early.grad, other_early.grad
    assert not of_one.any()
    assert close(of_other, 2 * alone(tiny, PROMPTS[0])[0])


def test_rows_that_a_block_edited_or_assigned_have_the_gradient_of_what_goes_on(
    tiny: LanguageModel,
) -> None:
    def plain(factor: float) -> Tensor:
        seen: list[Tensor] = []

        def scale(_module: Any, _args: Any, output: Tensor) -> Tensor:
            seen.append(output * factor)
            return seen[0]

        handle = tiny.transformer.h[1].module.register_forward_hook(scale)
        logits = tiny.module(**tiny.tokenizer(PROMPTS[0], return_tensors="pt")).logits
        handle.remove()
        return torch.autograd.grad(loss_of(logits), seen)[0]

    with tiny.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            edited = tiny.transformer.h[1].output
            edited *= 3
            first = loss_of(tiny.lm_head.output)
        with tracer.invoke(PROMPTS[0]):
            other = tiny.transformer.h[1].output
            second = loss_of(tiny.lm_head.output)
        with tracer.invoke(PROMPTS[0]):
            assigned = tiny.transformer.h[1].output * 2
            tiny.transformer.h[1].output = assigned
            third = loss_of(tiny.lm_head.output)
    for value, factor in ((edited, 3), (other, 1), (assigned, 2)):
        with tracekit.backward(first + second + third, retain_graph=True):
            gradient = value.grad
        assert close(gradient, plain(factor)), factor


def test_frozen_parameters_need_a_leaf_in_the_block_that_asks() -> None:
    net = small().requires_grad_(False)
    model = Model(net)
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            value = model[0].output.requires_grad_(True)
            with model.output.pow(2).sum().backward():
                gradient = value.grad
        with tracer.invoke(X[1:]):
            other = model.output
    plain = net[0](X[:1]).requires_grad_(True)
    expected = torch.autograd.grad(net[2](net[1](plain)).pow(2).sum(), plain)[0]
    assert torch.allclose(gradient, expected)
    assert torch.equal(other, net(X)[1:])


def test_a_cache_of_one_block_has_the_gradients_of_its_rows(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            one = tracer.cache(tiny.transformer.h, include_grads=True)
            first = loss_of(tiny.lm_head.output)
        with tracer.invoke(PROMPTS[1]):
            other = tracer.cache(tiny.transformer.h, include_grads=True)
            second = loss_of(tiny.lm_head.output)
    (first + second).backward()
    for cache, prompt in ((one, PROMPTS[0]), (other, PROMPTS[1])):
        for entries, plain in zip(cache.values(), alone(tiny, prompt), strict=True):
            assert entries.grad.shape == entries.output.shape
            assert close(entries.grad, plain)


def test_the_rows_of_a_router_have_their_gradients() -> None:
    net, _ = make("mixtral")
    model = Model(net)
    rows = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22, 23, 24]])]
    found: list[Tensor] = []
    with model.trace() as tracer:
        for i, row in enumerate(rows):
            with tracer.invoke(input_ids=row):
                value = model.model.layers[0].mlp.gate.output[0]
                loss = loss_of(model.output.logits)
                with loss.backward(retain_graph=i == 0):
                    found.append(value.grad)
    for row, gradient in zip(rows, found, strict=True):
        seen: list[Tensor] = []
        handle = net.model.layers[0].mlp.gate.register_forward_hook(  # pyright: ignore
            lambda _m, _a, output, seen=seen: seen.append(output[0])
        )
        loss = loss_of(net(input_ids=row).logits)
        handle.remove()
        expected = torch.autograd.grad(loss, seen[0], allow_unused=True)[0]
        assert gradient.shape == (4, seen[0].shape[-1])
        assert torch.allclose(gradient, expected, atol=1e-6)
