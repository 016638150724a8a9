"""`with loss.backward():` reads and replaces gradients, compared with torch's own ways to do it."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
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
from tracekit.core import origins
from tracekit.errors import GradientError, MisfitError, OutsideTraceError, SiteOrderError
from tracekit.tracing.attribute import with_items_opened_by
from tracekit.tracing.gradients import backward_item

FAMILIES = ["gpt2", "llama", "bert", "t5", "mixtral", "mamba", "gptj", "vit"]


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


def test_an_edit_in_place_reaches_no_gradient_beside_it() -> None:
    """Both sides of `a + b` get the same tensor from autograd."""
    base = torch.ones(3, requires_grad=True)
    left, right = base * 2, base * 3
    with tracekit.backward((left + right).sum()):
        right.grad[:] = 0
        kept = left.grad
    assert kept.tolist() == [1, 1, 1]
    assert base.grad is not None
    assert base.grad.tolist() == [2, 2, 2]


def test_what_the_block_does_to_a_gradient_later_changes_no_other() -> None:
    base = torch.ones(3, requires_grad=True)
    middle = base * 2
    top = middle + 0
    with tracekit.backward(top.sum()):
        total = top.grad
        total += middle.grad  # in place, when the pass has gone past `top`
    assert total.tolist() == [2, 2, 2]
    assert base.grad is not None
    assert base.grad.tolist() == [2, 2, 2]


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


def test_a_backward_in_the_block_of_a_backward() -> None:
    base = torch.arange(3.0, requires_grad=True)
    middle = base * 2
    one, two = middle.pow(2).sum(), middle.pow(3).sum()
    with tracekit.backward(one, retain_graph=True):
        with tracekit.backward(two, retain_graph=True):
            inner = middle.grad
        outer = middle.grad
    assert torch.equal(inner, 3 * middle.detach() ** 2)
    assert torch.equal(outer, 2 * middle.detach())
    assert base.grad is not None
    assert torch.equal(base.grad, 2 * (inner + outer))


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


def test_all_outputs_of_one_operation_have_their_gradients() -> None:
    base = torch.randn(2, 12, requires_grad=True)
    query, key, value = (base * 1).split(4, -1)
    loss = (query * key + value * 3).sum()
    with tracekit.backward(loss, retain_graph=True):
        of_query = query.grad
        value.grad *= 2
        of_key = key.grad
        of_value = value.grad
    assert torch.equal(of_query, key) and torch.equal(of_key, query)
    assert (of_value == 6).all()
    assert base.grad is not None
    assert torch.equal(base.grad, torch.cat([key, query, of_value], -1))


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


def test_users_own_hooks_come_before_and_retained_gradients_after() -> None:
    base = torch.ones(2, requires_grad=True)
    middle = base * 1
    middle.retain_grad()
    middle.register_hook(lambda gradient: gradient * 10)
    with tracekit.backward((middle * 1).sum()):
        seen = middle.grad
        middle.grad = seen + 1
    assert seen.tolist() == [10, 10]
    assert middle.grad is not None
    assert middle.grad.tolist() == [11, 11]


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


# --- rows of a batch ---------------------------------------------------------------------------


def test_a_tensor_that_stands_for_rows_has_their_gradient() -> None:
    net = small()
    batch = net[0](X)
    one, rest = batch[:1], batch[1:]
    origins.stands_for(one, batch, 0, 0, 1)
    origins.stands_for(rest, batch, 0, 1, 3)
    loss = net[2](net[1](batch)).pow(2).sum()
    plain = torch.autograd.grad(loss, batch, retain_graph=True)[0]
    with tracekit.backward(loss):
        of_one, of_rest = one.grad.clone(), rest.grad.clone()
        one.grad = of_one * 3
        rest.grad[0] = 0
        whole = batch.grad
    assert torch.equal(torch.cat([of_one, of_rest]), plain)
    expected = torch.cat([plain[:1] * 3, torch.zeros(1, 4), plain[2:]])
    assert torch.equal(whole, expected)
    assert net[0].bias.grad is not None
    assert torch.equal(net[0].bias.grad, expected.sum(0))


def test_rows_made_a_leaf_of_their_own_are_explained() -> None:
    batch = torch.ones(3, 4)
    one = batch[:1]
    origins.stands_for(one, batch, 0, 0, 1)
    one.requires_grad_(True)
    with pytest.raises(GradientError, match="only these rows of the batch"):
        with tracekit.backward(one.sum()):
            one.grad


# --- what cannot be ----------------------------------------------------------------------------


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


def test_a_branch_that_was_passed_is_an_error_too() -> None:
    base = torch.ones(2, requires_grad=True)
    left = base * 2
    right = base * 3
    with pytest.raises(SiteOrderError, match="had gone past it"):
        with tracekit.backward((left + right).sum()):
            left.grad
            right.grad


def test_a_gradient_is_read_again_until_the_pass_goes_on() -> None:
    base = torch.ones(2, requires_grad=True)
    middle = base * 2
    with pytest.raises(SiteOrderError):
        with tracekit.backward((middle * 1).sum()):
            assert middle.grad is middle.grad
            base.grad
            middle.grad


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
            refused(lambda: view.grad, "it is a view that was taken of another tensor")
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


def test_a_loss_that_is_not_one_number_is_refused_at_the_with() -> None:
    refused(lambda: tracekit.backward(torch.ones(2, requires_grad=True) * 1).__enter__(), "has 2")


def test_a_backward_runs_once() -> None:
    passed = tracekit.backward(torch.ones(2, requires_grad=True).sum())
    with passed:
        pass
    refused(passed.__enter__, "this backward pass has run")


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    middle = torch.ones(2, requires_grad=True) * 1
    with tracekit.backward(middle.sum()):
        for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float64), 1.0, None):
            with pytest.raises(MisfitError, match="cannot be replaced so"):
                middle.grad = wrong


def test_an_operation_that_gives_no_gradient_is_named() -> None:
    class Left(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
            return left + right

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0], None

    base = torch.ones(2, requires_grad=True)
    left, right = base * 1, base * 1
    with tracekit.backward(Left.apply(left, right).sum()):  # pyright: ignore
        refused(lambda: right.grad, "the operations that used it give none")
        assert left.grad is not None


def test_inputs_that_leave_a_tensor_out_are_named() -> None:
    base, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    middle = base * 1
    with pytest.raises(GradientError, match="inputs="):
        with tracekit.backward((middle * other).sum(), inputs=[other]):
            middle.grad


def test_a_generation_has_no_gradients() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    with model.generate(**inputs, max_new_tokens=1, do_sample=False):
        value = model.transformer.h[0].output
        logits = model.lm_head.output
    refused(lambda: tracekit.backward(logits.sum()).__enter__(), "does not require grad")
    with tracekit.backward(torch.ones(1, requires_grad=True).sum()):
        refused(lambda: value.grad, "generate() always computes so")


# --- errors and the state of torch -------------------------------------------------------------


def test_an_error_in_the_block_leaves_the_pass_and_shows_the_users_lines() -> None:
    base = torch.ones(2, requires_grad=True)
    middle = base * 1
    with pytest.raises(ZeroDivisionError) as caught:
        with tracekit.backward(middle.sum()):
            middle.grad
            1 / 0
    assert base.grad is None
    assert "grad" not in vars(torch.Tensor)
    assert len(traceback.extract_tb(caught.tb)) == 1
    middle.grad_fn  # the graph is still there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert middle.grad is None


def test_an_error_in_a_hook_comes_where_the_pass_was_let_run() -> None:
    def broken(_: Tensor) -> None:
        raise LookupError("in a hook")

    base = torch.ones(2, requires_grad=True)
    middle = base * 1
    top = middle * 1
    middle.register_hook(broken)
    with pytest.raises(LookupError, match="in a hook"):
        with tracekit.backward(top.sum()):
            top.grad
    with pytest.raises(LookupError, match="in a hook") as caught:
        with tracekit.backward((middle * 1).sum()):
            base.grad
    assert "base.grad" in [entry.line for entry in traceback.extract_tb(caught.tb)]


def test_stop_in_the_block_of_a_backward_ends_the_run() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        value = model[0].output
        with value.sum().backward():
            gradient = value.grad
            tracer.stop()
    assert (gradient == 1).all()
    assert model.module[0].weight.grad is None


def test_torch_is_as_it_was_afterwards() -> None:
    before = dict(vars(torch.Tensor))
    base = torch.ones(2, requires_grad=True)
    with tracekit.backward((base * 1).sum()):
        assert dict(vars(torch.Tensor)) != before
    with with_items_opened_by(backward_item):
        assert dict(vars(torch.Tensor)) != before
    assert dict(vars(torch.Tensor)) == before


def test_other_threads_see_torchs_own_gradients() -> None:
    import threading

    base = torch.ones(2, requires_grad=True)
    base.sum().backward()
    middle = base * 2
    seen: list[Any] = []
    with tracekit.backward(middle.sum()):
        thread = threading.Thread(target=lambda: seen.append(base.grad))
        thread.start()
        thread.join()
        brought = base.grad
    assert seen[0].tolist() == [3, 3]  # the accumulated one, which is the same tensor afterwards
    assert brought.tolist() == [2, 2]


def test_two_threads_have_their_own_passes() -> None:
    import threading

    def work(factor: float) -> None:
        for _ in range(20):
            middle = torch.ones(2, requires_grad=True) * 1
            with tracekit.backward((middle * factor).sum()):
                found.append((factor, middle.grad.tolist()))

    found: list[Any] = []
    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(gradient == [factor, factor] for factor, gradient in found)
    assert "grad" not in vars(torch.Tensor)


def test_where_blocks_are_not_compiled_with_items_are_opened_by_a_patch() -> None:
    middle = torch.ones(2, requires_grad=True) * 1
    with with_items_opened_by(backward_item):
        with (middle * 2).sum().backward(retain_graph=True):  # pyright: ignore
            gradient = middle.grad
        (middle * 2).sum().backward()  # not a `with`: torch's own
    assert gradient.tolist() == [2, 2]


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


def test_values_of_the_model_outside_its_trace_stay_refused() -> None:
    model = Model(small())
    middle = torch.ones(2, requires_grad=True) * 1
    with pytest.raises(OutsideTraceError):
        with tracekit.backward(middle.sum()):
            middle.grad
            model[0].output
