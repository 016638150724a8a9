"""With the garbage collector off, nothing of a backward pass with a block beside it stays alive."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracekit
from tests.tracing.plain import X, small, state_of
from tests.tracing.test_memory import found_by_collecting, living
from tracekit import Model
from tracekit.core import origins
from tracekit.errors import GradientError, MisfitError, SiteOrderError

TIMES = 25


def read_in_the_block(model: Model) -> None:
    with model.trace(X):
        early, late = model[0].output, model[1].output
        loss = model.output.sum()
        with loss.backward():
            of_late = late.grad
            early.grad = early.grad * 2
    assert of_late.shape == X.shape


def read_after_the_block(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
    with tracekit.backward(loss):
        gradient = value.grad
    assert gradient is not None


def nothing_asked(model: Model) -> None:
    with model.trace(X):
        with model.output.sum().backward():
            pass


def never_entered(model: Model) -> None:
    tracekit.backward(model(X).sum())


def rows(model: Model) -> None:
    base = model[0](X)
    view = base[:1]
    origins.stands_for(view, base, 0, 0, 1)
    with tracekit.backward((base * base).sum()):
        view.grad *= 2


def graph_of_gradients(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        with model.output.pow(2).sum().backward(create_graph=True, inputs=[value]):
            gradient = value.grad
    gradient.pow(2).sum().backward()
    value.grad = None


def error_in_the_block(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with model.trace(X):
            value = model[0].output
            with model.output.sum().backward():
                value.grad / (1 / 0)


def error_in_the_block_after_the_trace(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        loss = model.output.sum()
    try:
        with tracekit.backward(loss):
            value.grad
            1 / 0
    except ZeroDivisionError as error:
        assert error.__traceback__ is not None  # noqa: PT017 - caught as a user would


def error_in_the_pass(model: Model) -> None:
    def broken(_: Tensor) -> None:
        raise LookupError

    for asks in (True, False):
        with pytest.raises(LookupError):
            with model.trace(X):
                early, late = model[0].output, model[1].output
                early.register_hook(broken)
                with model.output.sum().backward():
                    late.grad
                    if asks:
                        model[0].weight.grad


def order_error(model: Model) -> None:
    with pytest.raises(SiteOrderError):
        with model.trace(X):
            early, late = model[0].output, model[1].output
            with model.output.sum().backward():
                early.grad
                late.grad


def refused(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        with model.output.sum().backward():
            with pytest.raises(GradientError):
                value[0].grad
            with pytest.raises(MisfitError):
                value.grad = 1
            value.grad


def freed_graph(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        loss = model.output.pow(2).sum()
    loss.backward()
    with pytest.raises(RuntimeError):
        with tracekit.backward(loss):
            value.grad


def stopped(model: Model) -> None:
    with model.trace(X) as tracer:
        value = model[0].output
        with value.sum().backward():
            value.grad
            tracer.stop()


def nested(model: Model) -> None:
    with model.trace(X):
        value = model[0].output
        out = model.output
        with out.sum().backward(retain_graph=True):
            with out.pow(2).sum().backward(retain_graph=True):
                value.grad
            value.grad


def interrupted_in_the_block(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X):
            value = model[0].output
            with model.output.sum().backward():
                value.grad
                raise KeyboardInterrupt


def press(_: Tensor) -> None:
    """Ctrl-C."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    for _ in range(10**8):  # until it comes
        pass


def interrupted_in_a_pass_in_the_block(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X):
            early, late = model[0].output, model[1].output
            early.register_hook(press)
            with model.output.sum().backward():
                late.grad
                model[0].weight.grad


def interrupted_in_the_pass(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        with model.trace(X):
            early, late = model[0].output, model[1].output
            early.register_hook(press)
            loss = model.output.sum()
        with tracekit.backward(loss):
            late.grad
            model[0].weight.grad


KINDS = [
    read_in_the_block,
    read_after_the_block,
    nothing_asked,
    never_entered,
    rows,
    graph_of_gradients,
    error_in_the_block,
    error_in_the_block_after_the_trace,
    error_in_the_pass,
    order_error,
    refused,
    freed_graph,
    stopped,
    nested,
    interrupted_in_the_block,
    interrupted_in_the_pass,
    interrupted_in_a_pass_in_the_block,
]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # of create_graph, said once
@pytest.mark.usefixtures("without_collector")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_passes_leave_nothing(kind: Callable[[Model], None]) -> None:
    model = Model(small())
    untouched, of_torch = state_of(model.module), dict(vars(torch.Tensor))
    known: dict[int, Any] = origins._origins  # pyright: ignore[reportPrivateUsage]
    for _ in range(3):  # compiles the block, starts the workers, makes the gradients' tensors
        kind(model)
    gc.collect()
    before, known_before = living(), len(known)
    for _ in range(5 if "interrupted" in kind.__name__ else TIMES):  # those wait for the signal
        kind(model)
    assert living() == before
    assert found_by_collecting() == []
    assert state_of(model.module) == untouched
    assert dict(vars(torch.Tensor)) == of_torch
    assert len(known) == known_before
