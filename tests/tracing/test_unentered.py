"""What opens a `with` and is thrown away without one is said to do nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.tracing.plain import X, small
from tracekit import Model
from tracekit.errors import CacheError, TracekitWarning


@pytest.fixture
def model() -> Model:
    return Model(small())


@pytest.mark.parametrize("what", ["trace", "scan", "edit"])
def test_a_context_that_is_dropped_on_the_spot_warns_at_its_line(what: str, model: Model) -> None:
    arguments = () if what == "edit" else (X,)
    with pytest.warns(TracekitWarning, match=rf"write `with model\.{what}\(") as caught:
        getattr(model, what)(*arguments)
    assert [warning.filename for warning in caught] == [__file__]
    with open(__file__) as file:
        line = file.read().splitlines()[caught[0].lineno - 1]
    assert line.strip() == "getattr(model, what)(*arguments)"


def test_an_invoke_that_is_dropped_on_the_spot_warns(model: Model) -> None:
    with pytest.warns(TracekitWarning, match=r"write `with tracer\.invoke\("):
        with model.trace() as tracer:
            tracer.invoke(X)


@pytest.fixture
def silence() -> Iterator[None]:
    """A warning is an error, also in `__del__`."""
    seen: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, seen.append
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracekitWarning)
        yield
    sys.unraisablehook = before
    assert not seen


def test_what_is_used_or_may_be_used_yet_does_not_warn(model: Model, silence: None) -> None:
    with model.trace(X):
        value = model[0].output
    model.trace(X).run(lambda: model[0].output)
    model.trace(X).run(capture=["0"])
    kept = model.trace(X)
    with kept:
        again = model[0].output
    kept = None
    made: list[Callable[..., Any]] = [lambda: model.trace(X)]
    unused = made[0]()
    del unused
    assert torch.equal(value, again)


def test_an_error_on_its_way_is_not_talked_over(model: Model, silence: None) -> None:
    with pytest.raises(ZeroDivisionError):
        print(model.trace(X), model.edit(), 1 / 0)
    with pytest.raises(TypeError):
        model.trace(X)(1)  # type: ignore[operator]
    with contextlib.suppress(CacheError):  # which drops the error, and the tracer with it
        model.trace(X).explain()
    with pytest.raises(RuntimeError, match="in the block"):
        with model.trace(X):
            raise RuntimeError("in the block")


def test_the_end_of_python_is_silent() -> None:
    code = "import torch, tracekit; t = tracekit.Model(torch.nn.ReLU()).trace(torch.ones(1))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
