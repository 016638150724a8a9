"""Sessions: plain blocks whose traces share values, and that can be left from anywhere."""

from __future__ import annotations

import pytest
import torch

from tests.tracing.plain import X, small, state_of
from tracekit import Model
from tracekit.errors import OutsideTraceError


def test_a_value_of_one_trace_is_used_in_the_next() -> None:
    model = Model(small())
    with model.session():
        with model.trace(X):
            first = model[0].output
        with model.trace(X * 2) as tracer:
            model[0].output = first
            result = tracer.result
    assert torch.equal(result, model(X))


def test_a_session_holds_loops_functions_and_other_sessions() -> None:
    model = Model(small())

    def traced(value: torch.Tensor) -> torch.Tensor:
        with model.session(), model.trace(value) as tracer:
            result = tracer.result
        return result

    with model.session() as session:
        value = X
        for _ in range(3):
            value = traced(value)
    assert session is not None
    assert torch.equal(value, model(model(model(X))))


def test_stop_leaves_the_session_between_traces_and_in_one() -> None:
    model = Model(small())
    before = state_of(model.module)
    reached = []
    with model.session() as session:
        with model.trace(X):
            value = model[0].output
        reached.append(1)
        session.stop()
        reached.append(2)
    with model.session() as session:
        with model.trace(X):
            late = model[1].output
            session.stop()
            model[2].output
        reached.append(3)
    assert reached == [1]
    assert torch.equal(late, torch.relu(value))
    assert state_of(model.module) == before


def test_stop_leaves_the_session_it_is_of_and_no_other() -> None:
    model = Model(small())
    reached = []
    with model.session() as outer:
        with model.session():
            outer.stop()
        reached.append(1)
    with model.session():
        with model.session() as inner:
            inner.stop()
        reached.append(2)
    assert reached == [2]
    with pytest.raises(OutsideTraceError, match="belongs into the block"):
        inner.stop()


def test_an_error_leaves_the_session_as_it_is() -> None:
    model = Model(small())
    with pytest.raises(ZeroDivisionError):
        with model.session():
            with model.trace(X):
                model[0].output / (1 / 0)
