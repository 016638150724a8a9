"""Traces in traces, and in every kind of place, never influence each other."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing import helpers
from tests.tracing.plain import X, small, state_of
from tracekit import Model
from tracekit.errors import OutsideTraceError, TracekitError

pytestmark = pytest.mark.usefixtures("each_way")


def test_a_trace_in_a_trace_of_the_same_model_has_values_of_its_own(
    model: Model, net: nn.Sequential
) -> None:
    with model.trace(X) as outer:
        first = model[0].output
        with model.trace(X * 2) as inner:
            nested = model[0].output
            model[1].output = torch.zeros(3, 4)
            inner_result = inner.result
        second = model[1].output
        outer_result = outer.result
    assert torch.equal(first, net[0](X))
    assert torch.equal(nested, net[0](X * 2))
    assert torch.equal(inner_result, net[2](torch.zeros(3, 4)))
    assert torch.equal(second, net[1](net[0](X)))
    assert torch.equal(outer_result, net(X))


def test_a_value_of_one_trace_is_written_in_another(model: Model, net: nn.Sequential) -> None:
    with model.trace(X):
        clean = model[0].output
    with model.trace(X * 2) as tracer:
        model[0].output = clean
        patched = tracer.result
    assert torch.equal(patched, net(X))


def test_a_value_of_the_outer_trace_is_written_in_the_inner(
    model: Model, net: nn.Sequential
) -> None:
    with model.trace(X):
        clean = model[0].output
        with model.trace(X * 2) as inner:
            model[0].output = clean
            patched = inner.result
    assert torch.equal(patched, net(X))


def test_the_outer_tracer_never_gives_the_inner_trace_its_own_values(
    model: Model, net: nn.Sequential
) -> None:
    got: list[Tensor] = []
    try:
        with model.trace(X) as outer:
            with model.trace(X * 2):
                got.append(outer.result)
    except TracekitError:
        return
    assert torch.equal(got[0], net(X))


def test_the_outer_tracer_never_stops_the_inner_trace_alone(model: Model) -> None:
    ran = []
    try:
        with model.trace(X) as outer:
            with model.trace(X * 2):
                outer.stop()
            ran.append("the rest of the outer block")
    except TracekitError:
        return
    assert ran == []


def test_a_trace_of_another_model_in_a_block(model: Model, net: nn.Sequential) -> None:
    other = nn.Linear(4, 4)
    helper = Model(nn.Sequential(other))
    with model.trace(X) as tracer:
        hidden = model[0].output
        with helper.trace(hidden):
            model_value = helper[0].output
        model[1].output = model_value
        got = tracer.result
    assert torch.equal(got, net[2](other(net[0](X))))


def test_the_outer_models_values_are_refused_in_the_block_of_another_model(model: Model) -> None:
    helper = Model(small())
    with pytest.raises(OutsideTraceError, match="not tracing"):
        with model.trace(X):
            with helper.trace(X):
                model[0].output


def test_three_traces_deep(model: Model, net: nn.Sequential) -> None:
    with model.trace(X):
        one = model[0].output
        with model.trace(one):
            two = model[0].output
            with model.trace(two):
                three = model[0].output
            more = model[1].output
    expected = net[0](net[0](net[0](X)))
    assert torch.equal(three, expected)
    assert torch.equal(more, net[1](net[0](net[0](X))))


def test_an_inner_error_that_the_outer_block_catches_leaves_the_outer_trace_whole(
    model: Model, net: nn.Sequential
) -> None:
    with model.trace(X) as outer:
        first = model[0].output
        try:
            with model.trace(X):
                model[0].output
                1 / 0
        except ZeroDivisionError:
            first = first + 0
        got = outer.result
    assert torch.equal(got, net(X)) and torch.equal(first, net[0](X))


def test_an_inner_trace_that_skips_what_the_outer_waits_for(
    model: Model, net: nn.Sequential
) -> None:
    with model.trace(X) as outer:
        model[0].output
        with model.trace(X) as inner:
            model[1].skip(torch.zeros(3, 4))
            skipped = inner.result
        model[1].skip(torch.ones(3, 4))
        got = outer.result
    assert torch.equal(skipped, net[2](torch.zeros(3, 4)))
    assert torch.equal(got, net[2](torch.ones(3, 4)))


def test_a_trace_in_a_hook_of_the_traced_model(model: Model, net: nn.Sequential) -> None:
    inner: list[Tensor] = []

    def hook(_: Any, __: Any, output: Tensor) -> None:
        if not inner:
            inner.append(output)
            with model.trace(X * 2):
                inner.append(model[0].output)

    handle = net[0].register_forward_hook(hook)
    with model.trace(X) as tracer:
        value = model[0].output
        got = tracer.result
    handle.remove()
    assert torch.equal(inner[1], net[0](X * 2))
    assert torch.equal(value, net[0](X)) and torch.equal(got, net(X))


# -- places ------------------------------------------------------------------------------------


def test_a_loop_of_traces(model: Model, net: nn.Sequential) -> None:
    got = []
    for scale in (1, 2, 3):
        with model.trace(X * scale) as tracer:
            model[0].output = model[0].output * scale
            got.append(tracer.result)
    expected = [net[2](net[1](net[0](X * scale) * scale)) for scale in (1, 2, 3)]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


class Probe:
    """Traces in a method, a static method and a property."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.seen: list[Tensor] = []

    def run(self) -> Tensor:
        with self.model.trace(X):
            self.seen.append(self.model[0].output)
            last = self.model[2].output
        return last

    @property
    def first(self) -> Tensor:
        with self.model.trace(X):
            value = self.model[0].output
        return value


def test_a_trace_in_a_method_and_in_a_property(model: Model, net: nn.Sequential) -> None:
    probe = Probe(model)
    assert torch.equal(probe.run(), net(X))
    assert torch.equal(probe.seen[0], net[0](X))
    assert torch.equal(probe.first, net[0](X))


def test_a_trace_in_a_generator_between_its_yields(model: Model, net: nn.Sequential) -> None:
    def values() -> Iterator[Tensor]:
        for index in range(3):
            with model.trace(X):
                value = model[index].output
            yield value

    expected = [net[0](X), net[1](net[0](X)), net(X)]
    assert all(torch.equal(one, other) for one, other in zip(values(), expected, strict=True))


def test_traces_in_async_functions(model: Model, net: nn.Sequential) -> None:
    async def run(scale: int) -> Tensor:
        await asyncio.sleep(0)
        with model.trace(X * scale):
            value = model[0].output
        await asyncio.sleep(0)
        return value

    async def both() -> list[Tensor]:
        return await asyncio.gather(run(1), run(2))

    one, two = asyncio.run(both())
    assert torch.equal(one, net[0](X)) and torch.equal(two, net[0](X * 2))


MODEL = Model(small())


class Values:
    """Traces while its class is made."""

    with MODEL.trace(X):
        first = MODEL[0].output
        last = MODEL[2].output


def test_a_trace_in_the_body_of_a_class() -> None:
    assert torch.equal(Values.first, MODEL.module[0](X))
    assert torch.equal(Values.last, MODEL.module(X))


def test_reads_in_comprehensions_closures_and_helpers_of_other_files(
    model: Model, net: nn.Sequential
) -> None:
    count = 0

    def outputs(*indices: int) -> list[Tensor]:
        return [model[index].output for index in indices]

    def run() -> Any:
        nonlocal count
        with model.trace(X):
            first = outputs(0)[0]
            rest = {index: model[index].output for index in (1, 2)}
            count += len(rest)
        return first, rest

    first, rest = run()
    assert count == 2
    assert torch.equal(first, net[0](X)) and torch.equal(rest[2], net(X))
    with model.trace(X):
        far = helpers.mean_of_output(model[1])
        helpers.zero_output(model[2])
        last = model.output
    assert torch.equal(far, net[1](net[0](X)).mean())
    assert not last.any()


@pytest.fixture
def traced_in_a_fixture(model: Model) -> Tensor:
    with model.trace(X):
        value = model[0].output
    return value


def test_a_trace_in_a_fixture(traced_in_a_fixture: Tensor, net: nn.Sequential) -> None:
    assert torch.equal(traced_in_a_fixture, net[0](X))


def test_a_trace_under_a_debuggers_trace_function(model: Model, net: nn.Sequential) -> None:
    lines: list[int] = []

    def watch(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename == __file__ and event == "line":
            lines.append(frame.f_lineno)
        return watch

    def run() -> Tensor:
        with model.trace(X):
            value = model[0].output
        return value

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        value = run()
        during = sys.gettrace()
    finally:
        sys.settrace(before)
    assert during is watch
    assert run.__code__.co_firstlineno + 1 in lines
    assert run.__code__.co_firstlineno + 3 in lines
    assert torch.equal(value, net[0](X))


def test_control_flow_depends_on_real_values(model: Model, net: nn.Sequential) -> None:
    with model.trace(X) as tracer:
        while model[0].output.sum() > 0:
            model[0].output -= 1
        if (model[1].output == 0).all():
            model[2].output = torch.full((3, 4), 5.0)
        got = tracer.result
    value = net[0](X)
    while value.sum() > 0:
        value = value - 1
    expected = net[2](net[1](value))
    assert torch.equal(got, torch.full((3, 4), 5.0) if (net[1](value) == 0).all() else expected)


# -- Ctrl-C and fork ---------------------------------------------------------------------------


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Interrupting(nn.Module):
    """Ctrl-C while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = True

    def forward(self, value: Tensor) -> Tensor:
        if self.armed:
            press_ctrl_c()
        return value


@pytest.mark.parametrize("reads", [True, False])
def test_ctrl_c_while_the_model_runs(reads: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), Interrupting(), nn.Linear(4, 4))
    model, before = Model(net), state_of(net)
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X) as tracer:
            tracer.cache()
            if reads:
                model[0].output
            model[2].output
    assert state_of(net) == before
    net[1].armed = False
    with model.trace(X):
        value = model[2].output
    assert torch.equal(value, net(X))


@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_while_the_block_runs(after: int, model: Model, net: nn.Sequential) -> None:
    ran = []
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X):
            if after:
                model[0].output
            ran.append(1)
            press_ctrl_c()
            while True:  # until it arrives
                pass
    assert ran == [1]
    with model.trace(X):
        value = model[2].output
    assert torch.equal(value, net(X))


def test_ctrl_c_in_a_nested_block(model: Model, net: nn.Sequential) -> None:
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X):
            model[0].output
            with model.trace(X):
                model[0].output
                press_ctrl_c()
                while True:
                    pass
    with model.trace(X):
        value = model[2].output
    assert torch.equal(value, net(X))


@pytest.mark.parametrize("ending", ["parks", "ends", "stops"])
def test_ctrl_c_as_the_block_comes_to_its_end_is_not_lost(ending: str) -> None:
    net = small()
    model, before = Model(net), state_of(net)
    for _ in range(50):  # the interrupt arrives at one of several moments
        with pytest.raises(KeyboardInterrupt):
            with model.trace(X) as tracer:
                model[0].output
                press_ctrl_c()
                if ending == "parks":
                    model[1].output
                elif ending == "stops":
                    tracer.stop()
            for _ in range(100):  # at the latest here, as without tracekit
                pass
        assert state_of(net) == before


def test_sys_exit_in_a_block_goes_through(model: Model) -> None:
    with pytest.raises(SystemExit):
        with model.trace(X):
            model[0].output
            sys.exit(3)


def test_stop_iteration_in_a_block_goes_through(model: Model) -> None:
    with pytest.raises(StopIteration):
        with model.trace(X):
            model[0].output
            next(iter(()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_after_a_fork_traces_with_workers_of_its_own(
    model: Model, net: nn.Sequential
) -> None:
    with model.trace(X):
        model[0].output
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with model.trace(X):
                value = model[2].output
            status = 0 if torch.equal(value, net(X)) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
