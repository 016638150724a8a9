"""Refused rather than wrong: outside a trace, in the model, in helpers, and after an error."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

import tracekit
from tests.tiny_models import make
from tests.tracing import helpers
from tests.tracing.conftest import LIFTED
from tests.tracing.plain import X, state_of
from tracekit import LanguageModel, Model
from tracekit.errors import (
    CacheError,
    InputError,
    MisfitError,
    NeverRanError,
    OutsideTraceError,
    SiteOrderError,
    UnknownModuleError,
    UnknownPathError,
)

pytestmark = pytest.mark.usefixtures("each_way")

PACKAGE = str(Path(tracekit.__file__).parent)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model(net: nn.Sequential) -> Iterator[Model]:
    """A model that traces afterwards as it did before."""
    before, numbers = state_of(net), net(X)
    model = Model(net)
    yield model
    assert state_of(net) == before
    with model.trace(X):
        assert torch.equal(model.output, numbers)


def lines_of(error: BaseException) -> list[str]:
    """The lines of this file and of helpers.py in the traceback, which has none of tracekit."""
    entries = traceback.extract_tb(error.__traceback__)
    assert not [entry for entry in entries if entry.filename.startswith(PACKAGE)]
    return [entry.line or "" for entry in entries if entry.filename in (__file__, helpers.__file__)]


# -- outside a trace ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.output,
        lambda model: model[0].output,
        lambda model: model[0].input,
        lambda model: model[0].inputs,
        lambda model: model[0].hidden,
        lambda model: model[0].skip(X),
        lambda model: model[0].next(),
        lambda model: model[0].calls[1].output,
        lambda model: setattr(model[0], "output", X),
        lambda model: setattr(model[0], "input", X),
        lambda model: setattr(model[0], "inputs", ((X,), {})),
        lambda model: setattr(model[0], "hidden", X),
    ],
)
def test_a_value_outside_a_trace_is_refused_with_the_way_in(
    read: Callable[[Model], Any], model: Model
) -> None:
    cure = r"model(\.0)?\.\w+.* `with model\.trace\(input\):`"
    with pytest.raises(OutsideTraceError, match=cure):
        read(model)
    with model.trace(X):
        pass
    with pytest.raises(OutsideTraceError):
        read(model)


@pytest.mark.parametrize(
    "use",
    [
        lambda tracer: tracer.result,
        lambda tracer: tracer.stop(),
        lambda tracer: tracer.next(),
        lambda tracer: list(tracer.iter[:]),
        lambda tracer: list(tracer.iter[0]),
        lambda tracer: list(tracer.all()),
    ],
)
def test_a_tracer_after_its_trace_is_refused(use: Callable[[Any], Any], model: Model) -> None:
    with model.trace(X) as tracer:
        model.output
    with pytest.raises(OutsideTraceError, match="only in the block of its trace"):
        use(tracer)


def test_a_cache_after_its_trace_is_refused(model: Model) -> None:
    with model.trace(X) as tracer:
        model.output
    with pytest.raises(CacheError, match="block of the trace"):
        tracer.cache()


def test_a_loop_that_outlives_its_trace_is_refused(model: Model) -> None:
    with model.trace(X) as tracer:
        steps = iter(tracer.iter[:])
        next(steps)
    with pytest.raises(OutsideTraceError):
        next(steps)


def test_a_generation_without_an_input_is_refused() -> None:
    model = LanguageModel("tracekit/tiny")
    with pytest.raises(InputError, match=r"an input is needed: a string, .* \[input\]"):
        model.generate()


def test_a_trace_without_an_input_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match=r"this trace has no input: give one"):
        with model.trace():
            pass


def test_a_value_in_a_trace_without_an_input_is_refused_where_it_is_asked_for(model: Model) -> None:
    with pytest.raises(OutsideTraceError, match=r"tracer.invoke\(input\)") as caught:
        with model.trace():
            model.output
    assert lines_of(caught.value)[-1] == "model.output"


def test_the_wrong_arguments_for_a_forward_are_the_models_own_error(model: Model) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'") as caught:
        with model.trace(inputs=X):
            model.output
    assert lines_of(caught.value)[-1] == "with model.trace(inputs=X):"


def test_a_record_of_what_a_skip_left_out_is_no_key(net: nn.Sequential) -> None:
    model = Model(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)))
    with model.trace(X) as tracer:
        cache = tracer.cache(model[0][0])
        model[0].skip(X)
    with pytest.raises(UnknownPathError, match=r"'model\.0\.0' was to be recorded"):
        cache["model.0.0"]


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda m: m.h, UnknownModuleError, r"'h' is not in Sequential \(model\)"),
        (lambda m: m[0].wieght, UnknownModuleError, "did you mean 'weight'"),
        (lambda m: m["3"], UnknownModuleError, r"'3' is not in model"),
        (lambda m: m[3], IndexError, "model has 3 modules"),
        (lambda m: setattr(m[0], "outptu", X), UnknownModuleError, "did you mean 'output'"),
        (lambda m: setattr(m[0], "imput", X), UnknownModuleError, "did you mean 'input'"),
        (lambda m: setattr(m, "hiden", X), UnknownModuleError, "did you mean 'hidden'"),
        (lambda m: m[0].output.shape, OutsideTraceError, "only while the model runs"),
    ],
)
def test_a_misspelled_name_is_refused_and_a_near_one_suggested(
    use: Callable[[Model], Any], error: type[Exception], says: str, model: Model
) -> None:
    with pytest.raises(error, match=says):
        use(model)


def test_hasattr_tells_what_a_module_has(model: Model) -> None:
    assert hasattr(model[0], "weight")
    assert not hasattr(model[0], "wieght")


def test_a_wrong_key_of_a_cache_is_refused_and_a_near_one_suggested(model: Model) -> None:
    with model.trace(X) as tracer:
        cache = tracer.cache()
    with pytest.raises(UnknownPathError, match=r"'modl\.1' is not in this cache; .*'model\.1'"):
        cache["modl.1"]
    with pytest.raises(UnknownModuleError, match="mdel"):
        cache.mdel


# -- errors elsewhere than in the block -----------------------------------------------------------


def test_an_error_in_a_helper_of_another_file_shows_its_line_as_well(
    model: Model, each_way: str
) -> None:
    with pytest.raises(LookupError) as caught:
        with model.trace(X):
            helpers.fail_at(model[0])
    lines = lines_of(caught.value)
    assert lines[-2:] == [
        "helpers.fail_at(model[0])",
        'raise LookupError("in a helper")',
    ]
    assert ("with model.trace(X):" in lines) == (each_way == LIFTED)


def test_an_order_error_in_a_nested_function_shows_every_line_on_the_way(
    model: Model, each_way: str
) -> None:
    def late() -> Tensor:
        return model[0].output

    with pytest.raises(SiteOrderError) as caught:
        with model.trace(X):
            model[1].output
            [late() for _ in range(1)]
    lines = lines_of(caught.value)
    assert lines[-1] == "return model[0].output"
    assert "[late() for _ in range(1)]" in lines
    assert ("with model.trace(X):" in lines) == (each_way == LIFTED)


class Failing(nn.Module):
    """Fails after a number of calls."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.calls = 0
        self.after = after

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.after:
            raise ConnectionError("in the model")
        return value


@pytest.mark.parametrize("asks", ["nothing", "before", "beyond", "cache"])
def test_an_error_in_the_model_has_its_own_lines_and_the_users(asks: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), Failing(), nn.Linear(4, 4))
    model = Model(net)
    before = state_of(net)
    with pytest.raises(ConnectionError, match="in the model") as caught:
        with model.trace(X) as tracer:
            if asks == "before":
                model[0].output
            elif asks == "beyond":
                model[2].output
            elif asks == "cache":
                tracer.cache()
    lines = lines_of(caught.value)
    assert "with model.trace(X) as tracer:" in lines
    assert lines[-1] == 'raise ConnectionError("in the model")'
    assert caught.value.__context__ is None
    assert state_of(net) == before


def test_a_block_that_waits_when_the_model_fails_is_unwound_through_its_finally() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), Failing(), nn.Linear(4, 4)))
    log = []
    with pytest.raises(ConnectionError):
        with model.trace(X):
            try:
                model[2].output
            except Exception:
                log.append("eaten")
            finally:
                log.append("finally")
            log.append("went on")
    assert log == ["finally"]


def test_an_error_in_a_later_step_leaves_the_values_of_the_steps_before() -> None:
    net, inputs = make("gpt2")
    before = state_of(net)
    dropout = net.transformer.h[0].mlp.dropout
    net.transformer.h[0].mlp.dropout = Failing(after=2)
    model = Model(net)
    had = []
    with pytest.raises(ConnectionError) as caught:
        with model.generate(**inputs, max_new_tokens=5, do_sample=False) as tracer:
            cache = tracer.cache("lm_head")
            for step in tracer.iter[:]:
                model.lm_head.output
                had.append(step)
    assert had == [0, 1]
    assert len(cache["model.lm_head"]) == 2
    assert "with model.generate(" in lines_of(caught.value)[-2]
    net.transformer.h[0].mlp.dropout = dropout
    assert state_of(net) == before


class Refusing(StoppingCriteria):
    """Fails when asked."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        raise ConnectionError("in the criterion")


def test_an_error_in_the_users_stopping_criterion_goes_through() -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    with pytest.raises(ConnectionError, match="in the criterion") as caught:
        with model.generate(**inputs, **GREEDY, stopping_criteria=[Refusing()]) as tracer:
            for _ in tracer.iter[:]:
                model.lm_head.output
    lines_of(caught.value)


# -- after an error that the block catches --------------------------------------------------------


def test_a_block_that_catches_an_order_error_goes_on_with_right_values(
    net: nn.Sequential, model: Model
) -> None:
    with model.trace(X):
        model[1].output
        with pytest.raises(SiteOrderError):
            model[0].output
        last = model[2].output
    assert torch.equal(last, net(X))


def test_a_block_that_catches_a_misfit_can_write_another_value(
    net: nn.Sequential, model: Model
) -> None:
    with model.trace(X) as tracer:
        with pytest.raises(MisfitError):
            model[0].output = torch.zeros(3, 5)
        model[0].output = torch.zeros(3, 4)
        result = tracer.result
    assert torch.equal(result, net[2](net[1](torch.zeros(3, 4))))


def test_a_misfit_leaves_the_value_as_it_was(net: nn.Sequential, model: Model) -> None:
    with model.trace(X) as tracer:
        with pytest.raises(MisfitError):
            model[0].output = torch.zeros(3, 4, dtype=torch.float64)
        result = tracer.result
    assert torch.equal(result, net(X))


def test_a_misfit_at_a_value_that_was_read_leaves_it_as_it_was(
    net: nn.Sequential, model: Model
) -> None:
    with model.trace(X) as tracer:
        value = model[0].output
        with pytest.raises(MisfitError):
            model[0].output = value[:2]
        result = tracer.result
    assert torch.equal(result, net(X))


def test_a_write_to_a_module_that_is_not_called_is_an_error_at_its_line(model: Model) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, value: Tensor) -> Tensor:
            return self.used(value)

    half = Model(Half())
    says = r"model\.unused\.output \(step 0\) was asked for.*not called: model ran without calling"
    with pytest.raises(NeverRanError, match=says) as caught:
        with half.trace(X):
            half.unused.output = torch.zeros(3, 4)
    assert lines_of(caught.value)[-1] == "half.unused.output = torch.zeros(3, 4)"


def test_a_misfit_of_another_device_is_an_error_at_its_line(model: Model) -> None:
    with pytest.raises(MisfitError, match="meta"):
        with model.trace(X):
            model[0].output = torch.zeros(3, 4, device="meta")


def test_errors_of_many_kinds_one_after_the_other_leave_the_numbers_alone(
    net: nn.Sequential, model: Model
) -> None:
    numbers = net(X)
    for _ in range(20):
        for fail in (1, 2, 3):
            with pytest.raises((SiteOrderError, ZeroDivisionError, MisfitError)):
                with model.trace(X) as tracer:
                    tracer.cache()
                    model[1].output[:] = 0
                    if fail == 1:
                        model[0].output
                    elif fail == 2:
                        1 / 0
                    model[2].output = 3
        with model.trace(X) as tracer:
            result = tracer.result
        assert torch.equal(result, numbers)
