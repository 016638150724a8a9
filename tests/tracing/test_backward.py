"""`with tracekit.backward(loss):` on any graph of autograd's, and what it refuses."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracekit
from tests.tracing.plain import X, small
from tracekit import Model
from tracekit.core import origins
from tracekit.errors import GradientError, MisfitError, OutsideTraceError, SiteOrderError
from tracekit.tracing.attribute import with_items_opened_by
from tracekit.tracing.gradients import backward_item


def refused(ask: Callable[[], object], text: str) -> None:
    with pytest.raises(GradientError) as caught:
        ask()
    assert text in str(caught.value)


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


def test_values_of_the_model_outside_its_trace_stay_refused() -> None:
    model = Model(small())
    middle = torch.ones(2, requires_grad=True) * 1
    with pytest.raises(OutsideTraceError):
        with tracekit.backward(middle.sum()):
            middle.grad
            model[0].output
