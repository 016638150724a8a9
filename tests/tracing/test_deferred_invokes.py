"""Blocks of several invokes that ran before: hooks alone fill what they store."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing.plain import X, check_nothing_stays, stack
from tracekit import Model, backward
from tracekit.errors import OverwrittenError, RowsError, SiteOrderError
from tracekit.interleave.mediator import Mediator

RUNS = 3  # the first makes requests


class Branch(nn.Module):
    """Runs `a` before `b`, and the other way round for two rows or more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(x)) if x.shape[0] > 3 else self.b(self.a(x))


def test_every_run_gives_each_block_what_its_input_alone_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = stack(3)
    model = Model(net)
    asked: list[Any] = []
    plain = Mediator.submit

    def counting(self: Mediator, request: Any) -> None:
        asked.append(request)
        plain(self, request)

    monkeypatch.setattr(Mediator, "submit", counting)
    for run in range(RUNS):
        inputs = [X[:1] + run, X[1:3] - run]
        with model.trace() as tracer:
            with tracer.invoke(inputs[0]):
                early = model[1].input
                late, total = model[2].output, tracer.result
            with tracer.invoke(inputs[1]):
                other = model[0].output[:, 1]
                same = model[2].output
            with tracer.invoke():
                whole = model[2].output
        torch.testing.assert_close(early, net[0](inputs[0]))
        torch.testing.assert_close(late, net(inputs[0]))
        torch.testing.assert_close(total, net(inputs[0]))
        torch.testing.assert_close(other, net[0](inputs[1])[:, 1])
        torch.testing.assert_close(same, net(inputs[1]))
        torch.testing.assert_close(whole, net(torch.cat(inputs)))
        assert bool(asked) == (run == 0)
        asked.clear()


def test_gradients_of_what_later_runs_stored_are_those_of_its_rows() -> None:
    net = stack(2)
    model = Model(net)

    def run() -> tuple[Tensor, Tensor]:
        with model.trace() as tracer:
            with tracer.invoke(X[:1].clone().requires_grad_()):
                hidden = model[0].output
                out = model[1].output
            with tracer.invoke(X[1:2].clone()):
                other = model[1].output
        with backward(out.sum() + 2 * other.sum()):
            grad = hidden.grad
        return hidden, grad

    plain = net[0](X[:1]).detach().requires_grad_()
    net[1](plain).sum().backward()
    for _ in range(RUNS):
        hidden, grad = run()
        torch.testing.assert_close(hidden, net[0](X[:1]))
        torch.testing.assert_close(grad, plain.grad)


def test_one_block_whose_value_has_passed_ends_the_run_and_all_keep_what_came() -> None:
    model = Model(Branch())
    found: list[dict[str, Tensor]] = []

    def run(rows: int) -> None:
        kept: dict[str, Tensor] = {}
        other: dict[str, Tensor] = {}
        found.extend([kept, other])
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(rows, 2)):
                other["b"] = model.b.output
            with tracer.invoke(torch.ones(1, 2)):
                kept["a"] = model.a.output
                kept["b"] = model.b.output

    for _ in range(2):
        run(1)
    with pytest.raises(SiteOrderError, match=r"model\.b\.output .*runs it before") as no:
        run(4)
    assert (list(found[-2]), list(found[-1])) == (["a"], ["b"])
    assert traceback.extract_tb(no.value.__traceback__)[-1].line == 'kept["b"] = model.b.output'


def test_rows_that_can_not_be_told_in_a_later_run_are_an_error_at_the_line() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.pick = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            out = self.first(x)
            return self.pick(out[:1] if out.shape[0] > 4 else out)

    model = Model(Halves())

    def run(rows: int) -> Tensor:
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(rows, 2)):
                first = model.first.output
                picked = model.pick.output
            with tracer.invoke(torch.ones(1, 2)):
                other = model.first.output  # noqa: F841
        return first + picked

    for _ in range(2):
        run(2)
    with pytest.raises(RowsError, match=r"model\.pick\.output") as no:
        run(4)
    assert traceback.extract_tb(no.value.__traceback__)[-1].line == "picked = model.pick.output"


def test_what_the_model_overwrites_is_refused_in_every_run() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))

    def run() -> Tensor:
        with model.trace() as tracer:
            with tracer.invoke(X[:1]):
                hidden = model[0].output
            with tracer.invoke(X[1:2]):
                out = model[1].output
        return hidden + out

    for _ in range(RUNS):
        with pytest.raises(OverwrittenError, match=r"model\.0\.output"):
            run()


def test_an_error_in_the_model_leaves_each_block_what_came_before() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if x.shape[0] > 3:
                raise LookupError("too many rows")
            return self.b(x)

    model = Model(Fails())
    found: list[list[Tensor]] = []

    def run(rows: int) -> None:
        first: list[Tensor] = []
        second: list[Tensor] = []
        found.extend([first, second])
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(rows, 2)):
                first.append(model.a.output)
                first.append(model.b.output)
            with tracer.invoke(torch.ones(1, 2)):
                second.append(model.a.output)

    run(1)
    run(2)
    assert [len(each) for each in found] == [2, 1, 2, 1]
    with pytest.raises(LookupError, match="too many rows"):
        run(4)
    assert [each[0].shape[0] for each in found[-2:]] == [4, 1]
    assert [len(each) for each in found[-2:]] == [1, 1]


def test_later_runs_leave_no_hook_and_keep_nothing() -> None:
    net = stack(2)
    model = Model(net)

    def run() -> list[Tensor]:
        with model.trace() as tracer:
            with tracer.invoke(X[:1].clone()):
                first = model[0].output
            with tracer.invoke(X[1:2].clone()):
                second = model[1].output
        return [first, second]

    check_nothing_stays(net, run)


def test_the_graph_of_later_runs_is_that_of_the_first() -> None:
    model = Model(stack(2))
    graphs: list[Any] = []

    def run() -> None:
        with model.trace() as tracer:
            with tracer.invoke(X[:1]):
                first = model[0].output  # noqa: F841
                second = model[1].output  # noqa: F841
            with tracer.invoke(X[1:2]):
                third = model[0].output  # noqa: F841
        graphs.append(tracer.graph)

    for _ in range(RUNS):
        run()
    told = [graph.to_json() for graph in graphs]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_block_for_all_rows_has_copies_of_its_own(mode: Callable[[], Any]) -> None:
    net = stack(2)
    model = Model(net)
    for _ in range(RUNS):
        with mode():
            with model.trace() as tracer:
                with tracer.invoke(X[:2]):
                    pass
                with tracer.invoke():
                    every = model[0].output
                with tracer.invoke():
                    again = model[0].output
            torch.testing.assert_close(every, net[0](X[:2]))
            every.zero_()
            torch.testing.assert_close(again, net[0](X[:2]))
