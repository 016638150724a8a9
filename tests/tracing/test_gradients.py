"""`with loss.backward():` reads and replaces gradients, compared with torch's own ways to do it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracekit
from tests.tiny_models import SPECS, make
from tests.tracing.helpers import gradient_of
from tests.tracing.plain import X, small
from tracekit import Model
from tracekit.core.settings import settings
from tracekit.errors import GradientError, SiteOrderError

FAMILIES = ["gpt2", "llama", "bert", "t5", "mixtral", "mamba", "gptj", "vit"]


@pytest.fixture(autouse=True, params=[True, False], ids=["lifted", "in place"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The block is lifted onto a worker, or stays where it stands, and all is the same."""
    with settings.changed(lift_blocks=request.param):
        yield


def parameters_of(net: nn.Module) -> dict[str, Tensor]:
    """What has accumulated in `.grad`, copied."""
    return {
        name: parameter.grad.clone()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def blocks_of(family: str, net: nn.Module) -> list[str]:
    """The paths of the model's blocks, in the order in which they run."""
    lists: list[Any] = [(path, net.get_submodule(path)) for path in SPECS[family].layers]
    return [f"{path}.{index}" for path, blocks in lists for index in range(len(blocks))]


def at(model: Model, path: str) -> Any:
    """The Envoy at a path without the root's name."""
    found: Any = model
    for name in path.split("."):
        found = found[name]
    return found


def loss_of(output: Any) -> Tensor:
    return output[0].float().logsumexp(-1).sum()


def run_with_hooks(
    net: nn.Module,
    inputs: dict[str, Any],
    paths: list[str],
    change: Callable[[int, Tensor], Tensor | None],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of modules' outputs in backward order, by hand-written tensor hooks."""
    found: dict[int, Tensor] = {}
    handles: list[Any] = []

    def on_gradient(index: int, gradient: Tensor) -> Tensor | None:
        new = change(index, gradient)
        found[index] = (gradient if new is None else new).clone()
        return new

    def on_forward(index: int, output: Any) -> None:
        first(output).register_hook(lambda gradient: on_gradient(index, gradient))

    for index, path in enumerate(paths):
        module = net.get_submodule(path)
        handles.append(
            module.register_forward_hook(
                lambda _module, _args, output, index=index: on_forward(index, output)
            )
        )
    net.zero_grad()
    loss_of(net(**inputs)).backward()
    for handle in handles:
        handle.remove()
    grads = parameters_of(net)
    net.zero_grad()
    return [found[index] for index in reversed(range(len(paths)))], grads


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_read_in_the_block_are_those_of_hand_written_hooks(family: str) -> None:
    net, inputs = make(family)
    paths = blocks_of(family, net)
    plain, accumulated = run_with_hooks(net, inputs, paths, lambda index, gradient: None)
    model = Model(net)
    with model.trace(**inputs) as tracer:
        values = [first(at(model, path).output) for path in paths]
        loss = loss_of(tracer.result)
        with loss.backward():
            read = [value.grad for value in reversed(values)]
    assert len(read) == len(plain) > 1
    for ours, theirs in zip(read, plain, strict=True):
        assert torch.equal(ours, theirs)
    ours = parameters_of(net)
    assert ours.keys() == accumulated.keys()
    assert all(torch.equal(ours[name], accumulated[name]) for name in ours)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gptj"])
@pytest.mark.parametrize("way", ["assigned", "in place", "multiplied"])
def test_the_pass_goes_on_with_a_replaced_gradient(family: str, way: str) -> None:
    net, inputs = make(family)
    paths = blocks_of(family, net)

    def change(index: int, gradient: Tensor) -> Tensor | None:
        if index != len(paths) - 1:
            return None
        new = gradient.clone()
        new[:, 0] = 0
        return new * 2

    plain, accumulated = run_with_hooks(net, inputs, paths, change)
    model = Model(net)
    with model.trace(**inputs) as tracer:
        values = [first(at(model, path).output) for path in paths]
        loss = loss_of(tracer.result)
        with loss.backward():
            last = values[-1]
            if way == "assigned":
                new = last.grad.clone()
                new[:, 0] = 0
                last.grad = new * 2
            elif way == "in place":
                last.grad[:, 0] = 0
                last.grad[:] = last.grad * 2
            else:
                last.grad[:, 0] = 0
                last.grad *= 2
            read = [value.grad for value in reversed(values)]
    mine = parameters_of(net)
    assert all(torch.equal(mine[name], accumulated[name]) for name in accumulated)
    unchanged, _ = run_with_hooks(net, inputs, paths, lambda index, gradient: None)
    assert not torch.equal(read[0], unchanged[0])
    for ours, theirs in zip(read, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_names_bound_in_the_block_are_bound_after_it() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
        with loss.backward() as context:
            gradient = value.grad
        bound_after = gradient + 1
    assert gradient.shape == value.shape
    assert torch.equal(bound_after, gradient + 1)
    assert "done" in repr(context)


def test_several_losses_one_after_the_other() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        one, two = model.output.sum(), model.output.pow(2).sum()
        with one.backward(retain_graph=True):
            first_gradient = value.grad
        with two.backward():
            second_gradient = value.grad
    value = model.module[0](X)
    rest = model.module[2](model.module[1](value))
    plain = torch.autograd.grad(rest.sum(), value, retain_graph=True)[0]
    assert torch.equal(first_gradient, plain)
    assert torch.equal(second_gradient, torch.autograd.grad(rest.pow(2).sum(), value)[0])


def test_a_loss_of_several_numbers_takes_a_weight_for_each() -> None:
    model = Model(small())
    weights = torch.arange(12.0).view(3, 4)
    with model.trace(X):
        value = model[0].output
        out = model.output
        with out.backward(gradient=weights):
            gradient = value.grad
    value = model.module[0](X)
    rest = model.module[2](model.module[1](value))
    assert torch.equal(gradient, torch.autograd.grad(rest, value, weights)[0])


def test_plain_backward_works_in_the_block_and_after_it() -> None:
    model = Model(small())
    for is_inside in (True, False):
        model.module.zero_grad()
        with model.trace(X):
            value = model[0].output
            value.retain_grad()
            loss = model.output.sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        retained = value.grad
        plain = model.module[0](X)
        rest = model.module[2](model.module[1](plain)).sum()
        assert torch.equal(retained, torch.autograd.grad(rest, plain)[0])


def test_a_backward_after_the_trace_and_in_helper_functions_is_spelled_as_a_function() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
        inside = gradient_of(value, loss)
    with tracekit.backward(loss):
        outside = value.grad
    assert torch.equal(inside, outside)
    assert inside.abs().sum() > 0


def test_a_pass_can_pause_while_the_model_goes_on() -> None:
    model = Model(small())
    net = model.module
    with model.trace(X) as tracer:
        value = model[0].output
        early = value.pow(2).sum()
        with early.backward(retain_graph=True):
            model[1].output = model[1].output + value.grad
        result = tracer.result
    plain = net[0](X)
    assert torch.equal(result, net[2](net[1](plain) + 2 * plain))


def test_a_trace_in_the_block_of_a_backward() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
        with loss.backward():
            gradient = value.grad
            with model.trace(X + gradient):
                moved = model.output
    assert torch.equal(moved, model.module(X + gradient))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_gradient_of_a_gradient() -> None:
    model = Model(small(nn.Tanh()))
    with model.trace(X):
        value = model[0].output
        loss = model.output.pow(2).sum()
        with loss.backward(create_graph=True):
            gradient = value.grad
    curvature = torch.autograd.grad(gradient.pow(2).sum(), value)[0]
    plain = model.module[0](X)
    rest = model.module[2](model.module[1](plain)).pow(2).sum()
    (once,) = torch.autograd.grad(rest, plain, create_graph=True)
    assert torch.equal(curvature, torch.autograd.grad(once.pow(2).sum(), plain)[0])
    for parameter in model.module.parameters():
        parameter.grad = None  # with its graph it refers to itself


def test_the_gradient_of_a_parameter_is_what_this_pass_brings() -> None:
    net = small()
    weight = net[0].weight
    net(X).sum().backward()
    assert weight.grad is not None
    before = weight.grad.clone()
    model = Model(net)
    with model.trace(X):
        loss = model.output.sum()
        with loss.backward():
            brought = model[0].weight.grad
            weight.grad = brought * 10
    assert torch.equal(brought, before)
    assert torch.allclose(weight.grad, before * 11)


def test_torchs_own_functions_see_what_has_accumulated() -> None:
    net = small()
    net(X).sum().backward()
    model = Model(net)
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
        with loss.backward():
            value.grad
            net.zero_grad()
            net[2].bias.grad = None
    assert net[2].weight.grad is None  # the pass had brought it before zero_grad()
    assert net[0].weight.grad is not None  # and this one after


def test_only_the_inputs_that_are_named_get_gradients() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
        with loss.backward(inputs=[value]):
            gradient = value.grad
    plain = model.module[0](X)
    rest = model.module[2](model.module[1](plain)).sum()
    assert torch.equal(gradient, torch.autograd.grad(rest, plain)[0])
    assert not parameters_of(model.module)


def test_the_pass_of_a_value_that_was_edited_in_place_is_of_what_the_model_goes_on_with() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        model[0].output[:, 0] = 5
        loss = (model.output * 1).pow(2).sum()
        with loss.backward():
            gradient = value.grad
    plain = model.module[0](X).detach()
    plain[:, 0] = 5
    plain.requires_grad_(True)
    rest = model.module[2](model.module[1](plain)).pow(2).sum()
    assert torch.equal(gradient, torch.autograd.grad(rest, plain)[0])


def test_frozen_parameters_need_a_leaf() -> None:
    net = small().requires_grad_(False)
    model = Model(net)
    with model.trace(X):
        value = model[0].output.requires_grad_(True)
        loss = model.output.sum()
        with loss.backward():
            gradient = value.grad
    assert torch.equal(gradient, (net[1](net[0](X)) > 0) * net[2].weight.sum(0))


@pytest.mark.parametrize("state", ["inference", "autocast"])
def test_the_pass_runs_under_the_torch_state_of_the_user(state: str) -> None:
    model = Model(small())
    seen: list[Any] = []
    is_autocast = state == "autocast"
    with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
        with model.trace(X):
            value = model[0].output
            loss = model.output.float().sum()
            value.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
            with torch.inference_mode(not is_autocast), loss.backward():
                value.grad[:] = 0
    assert seen == [is_autocast]
    assert model.module[0].weight.grad is not None
    assert not model.module[0].weight.grad.any()


def test_a_gradient_asked_for_too_late_is_an_error_that_names_both() -> None:
    model = Model(small())
    with pytest.raises(SiteOrderError) as caught:
        with model.trace(X):
            early, late = model[0].output, model[1].output
            loss = model.output.sum()
            with loss.backward():
                early.grad
                late.grad
    (line,) = [
        entry.lineno
        for entry in traceback.extract_tb(caught.tb)
        if entry.line is not None and entry.line == "late.grad"
    ]
    assert line is not None
    assert str(caught.value).startswith(
        f"the gradient of model.1.output (step 0) was asked for after that of model.0.output "
        f"(step 0) (line {line - 1}), when the backward pass had gone past it"
    )
    assert all("tracekit" not in entry.filename for entry in traceback.extract_tb(caught.tb)[1:])
    assert model.module[0].weight.grad is None  # known at once: the pass has not ended


def refused(ask: Callable[[], object], text: str) -> None:
    with pytest.raises(GradientError) as caught:
        ask()
    assert text in str(caught.value)


def test_a_value_without_grad_says_why() -> None:
    model = Model(small())
    with torch.no_grad(), model.trace(X):
        bare = model[0].output
    frozen = Model(small().requires_grad_(False))
    with frozen.trace(X):
        cold = frozen[0].output
    with torch.inference_mode(), model.trace(X):
        inferred = model[0].output
    for value, text in [
        (bare, "model.0.output (step 0)"),
        (bare, "it was computed without grad"),
        (cold, ".requires_grad_(True)"),
        (inferred, "inference mode"),
        (torch.ones(2, dtype=torch.int64), "only floating-point values"),
    ]:
        with tracekit.backward(torch.ones(1, requires_grad=True).sum()):
            refused(lambda value=value: value.grad, text)
        refused(lambda value=value: tracekit.backward(value).__enter__(), text)


def test_a_view_or_a_copy_that_the_model_does_not_go_on_with_says_so() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        view, copy = value[0], value.clone()
        loss = model.output.sum()
        with loss.backward():
            refused(
                lambda: view.grad, "a view of model.0.output (step 0) has no gradient: it is a "
            )
            refused(lambda: view.grad, "view that was taken of another tensor")
            refused(lambda: copy.grad, "the loss was not computed from it")
            refused(lambda: torch.ones(1, requires_grad=True).grad, "not computed from it")
            gradient = value.grad  # none of them has let the pass run
    assert gradient.abs().sum() > 0


def test_a_graph_that_was_freed_is_torchs_own_error_at_the_users_line() -> None:
    model = Model(small())
    with model.trace(X):
        value = model[0].output
        loss = model.output.pow(2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True") as caught:
        with tracekit.backward(loss):
            value.grad
    lines = [entry.line for entry in traceback.extract_tb(caught.tb)]
    assert "value.grad" in lines
    assert not any("tracing/gradients" in e.filename for e in traceback.extract_tb(caught.tb))


def test_a_generation_has_no_gradients() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    with model.generate(**inputs, max_new_tokens=1, do_sample=False):
        value = model.transformer.h[0].output
        logits = model.lm_head.output
    refused(lambda: tracekit.backward(logits.sum()).__enter__(), "does not require grad")
    with tracekit.backward(torch.ones(1, requires_grad=True).sum()):
        refused(lambda: value.grad, "generate() always computes so")


def test_stop_in_the_block_of_a_backward_ends_the_run() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        value = model[0].output
        with value.sum().backward():
            gradient = value.grad
            tracer.stop()
    assert (gradient == 1).all()
    assert model.module[0].weight.grad is None


def test_backward_of_something_else_in_a_block_is_its_own() -> None:
    class Other:
        def backward(self, value: int) -> Any:
            return nullcontext(value + 1)

    model = Model(small())
    other = Other()
    with model.trace(X):
        model[0].output
        with other.backward(1) as found:
            pass
    assert found == 2


def test_functions_in_the_place_of_blocks_go_back_too() -> None:
    model = Model(small())
    found: list[Tensor] = []

    def block() -> Tensor:
        value = model[0].output
        with model.output.sum().backward():
            return value.grad

    def edit(edited: Any) -> None:
        value = edited[0].output
        with edited[1].output.sum().backward(retain_graph=True):
            found.append(value.grad)

    plain = model.module[0](X)
    rest = model.module[1](plain)
    expected = torch.autograd.grad(model.module[2](rest).sum(), plain, retain_graph=True)[0]
    assert torch.equal(model.trace(X).run(block), expected)
    model.edit(edit)(X)
    assert torch.equal(found[0], torch.autograd.grad(rest.sum(), plain)[0])


def test_a_lasting_edit_goes_back() -> None:
    model = Model(small())
    with model.edit() as edited:
        value = edited[0].output
        with edited[1].output.sum().backward(retain_graph=True):
            gradient = value.grad
        edited[1].output = edited[1].output + gradient
    with edited.trace(X):
        result = edited.output
    plain = model.module[0](X)
    rest = model.module[1](plain)
    (gradient,) = torch.autograd.grad(rest.sum(), plain, retain_graph=True)
    assert torch.equal(result, model.module[2](rest + gradient))


def test_a_dry_run_goes_back_without_computing() -> None:
    model = Model(small())
    with model.scan(X):
        early, late = model[0].output, model[1].output
        with model.output.sum().backward(retain_graph=True):
            gradient = early.grad
        with pytest.raises(SiteOrderError):
            with model.output.sum().backward():
                early.grad
                late.grad
    assert gradient.shape == X.shape
    assert model.module[0].weight.grad is None
