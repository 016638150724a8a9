"""Every mistake in a block: what it says, where it points; the model stays as it was."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import make
from tests.tracing.plain import state_of
from tracekit import Model, TracekitError
from tracekit.errors import (
    CacheError,
    MisfitError,
    NeverRanError,
    OutsideTraceError,
    ShortLoopWarning,
    SiteOrderError,
    StepError,
    UnknownModuleError,
    UnknownPathError,
)

pytestmark = pytest.mark.usefixtures("each_way")

IDS = torch.arange(10, 16).reshape(2, 3)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@dataclass(frozen=True)
class Mistake:
    """A mistake, marked `# here` in its line; without such a line it is the `with` that fails."""

    make: Callable[[Model], object]
    error: type[BaseException]
    says: str


MISTAKES: list[Mistake] = []


def mistake(
    error: type[BaseException], says: str = "."
) -> Callable[[Callable[[Model], object]], Callable[[Model], object]]:
    def add(make: Callable[[Model], object]) -> Callable[[Model], object]:
        MISTAKES.append(Mistake(make, error, says))
        return make

    return add


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2")[0]


@pytest.fixture
def model(net: nn.Module) -> Iterator[Model]:
    """A model that traces afterwards as it did before."""
    before = state_of(net)
    numbers = net(IDS).logits
    model = Model(net)
    yield model
    assert state_of(net) == before
    assert torch.equal(net(IDS).logits, numbers)
    with model.trace(IDS) as tracer:
        cache = tracer.cache()
        logits = tracer.result.logits
    assert torch.equal(logits, numbers)
    assert len(cache) > 20
    assert state_of(net) == before


def own_lines(error: BaseException, below: str) -> list[str]:
    """The lines of the traceback from the function `below` on, all of them of this file."""
    entries = traceback.extract_tb(error.__traceback__)
    names = [entry.name for entry in entries]
    entries = entries[names.index(below) :]
    assert [entry.filename for entry in entries] == [__file__] * len(entries)
    return [entry.line or "" for entry in entries]


# -- errors of the user's own ---------------------------------------------------------------------


@mistake(ZeroDivisionError, "division by zero")
def an_error_before_anything_is_asked(model: Model) -> None:
    with model.trace(IDS):
        1 / 0  # here


@mistake(ZeroDivisionError, "division by zero")
def an_error_after_a_read(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output
        1 / 0  # here


@mistake(KeyError, "no such key")
def an_error_after_the_run(model: Model) -> None:
    with model.trace(IDS) as tracer:
        tracer.result
        raise KeyError("no such key")  # here


@mistake(IndexError, "out of range|out of bounds")
def an_error_of_torch(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output[5]  # here


@mistake(AttributeError, "'Tensor' object has no attribute 'logitts'")
def an_attribute_that_a_value_lacks(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.output.logitts  # here


@mistake(ZeroDivisionError)
def an_error_in_a_step(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            model.transformer.h[0].output / (1 // (1 - step))  # here


@mistake(NameError, "undefined_name")
def a_name_that_is_not_bound(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output[:] = undefined_name  # noqa: F821  # here


# -- order ----------------------------------------------------------------------------------------


@mistake(
    SiteOrderError,
    r"^model\.transformer\.h\.0\.output \(step 0\) was asked for after "
    r"model\.transformer\.h\.1\.output \(step 0\) \(line \d+\), .* ask in the model's order, or "
    r"use tracer\.cache\(\)\. \[site-order\]$",
)
def the_wrong_order(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[1].output
        model.transformer.h[0].output  # here


@mistake(SiteOrderError, r"asked for a second time.*line \d+ had it.*keep the first value")
def the_same_value_twice(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.output
        with contextlib.suppress(NeverRanError):
            model.lm_head.calls[1].output
        model.lm_head.output  # here


@mistake(SiteOrderError, r"h\.0\.input .*after .*h\.0\.output")
def the_input_after_the_output(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output
        model.transformer.h[0].input  # here


@mistake(SiteOrderError, r"after .*lm_head\.output")
def an_edit_after_the_model_had_passed(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.output
        model.transformer.h[0].output = torch.zeros(2, 3, 32)  # here


@mistake(SiteOrderError, r"h\.0\.skip\(\) came when the module had begun.*\(line \d+\)")
def a_skip_of_what_has_run(model: Model) -> None:
    with model.trace(IDS):
        value = model.transformer.h[0].output
        model.transformer.h[0].skip(value)  # here


@mistake(SiteOrderError, r"lm_head\.output \(step 0\) was asked for when the run had ended")
def a_value_asked_for_after_the_result(model: Model) -> None:
    with model.trace(IDS) as tracer:
        tracer.result
        model.lm_head.output  # here


# -- modules that do not run, steps that do not happen ---------------------------------------------


@mistake(NeverRanError, r"ModuleList, which is never called.*model\.transformer\.h\[0\]\.output")
def the_output_of_a_list(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h.output  # here


@mistake(NeverRanError, r"h\.1\.mlp\.output .*h\.1, which contains it, was skipped")
def a_module_inside_one_that_is_skipped(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[1].skip(model.transformer.h[0].output)
        model.transformer.h[1].mlp.output  # here


@mistake(NeverRanError, r"lm_head\.output .*call 1.*at most 1 times")
def a_second_call_that_is_not_made(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.calls[1].output  # here


@mistake(IndexError, "counted from 0")
def a_call_counted_from_the_end(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.calls[-1].output  # here


@mistake(StepError, r"step 1\) did not happen: the run had 1 step|step 1 .*the run ended")
def a_step_after_a_forward_pass(model: Model) -> None:
    with model.trace(IDS):
        model.lm_head.next().output  # here


@mistake(StepError, "can't be counted from the end of this generation: .* give min_new_tokens=")
def a_step_counted_from_an_end_that_is_not_known(model: Model) -> None:
    with model.generate(IDS, **GREEDY, eos_token_id=7) as tracer:
        for _ in tracer.iter[-1]:  # here
            pass


# -- values that do not fit ------------------------------------------------------------------------

FITS = r"write a value of the same structure, shape, dtype and device.*\[misfit\]$"


@mistake(MisfitError, rf"h\.0\.output cannot .*Tensor\[2, 3, 32\].*Tensor\[2, 3, 31\].*{FITS}")
def a_value_of_another_shape(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output = torch.zeros(2, 3, 31)  # here


@mistake(MisfitError, rf"float32 cpu, and .*float64 cpu was written; {FITS}")
def a_value_of_another_dtype(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output = model.transformer.h[0].output.double()  # here


@mistake(MisfitError, rf"was Tensor.*, and tuple of 1 was written.*{FITS}")
def a_tuple_for_a_tensor(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output = (model.transformer.h[0].output,)  # here


@mistake(MisfitError, "was tuple of 2, .*assign to .hidden")
def a_tensor_for_a_tuple(model: Model) -> None:
    with model.trace(IDS):
        attention = model.transformer.h[0].attn.output
        model.transformer.h[0].attn.output = attention[0]  # here


@mistake(MisfitError, "and int was written")
def a_number_for_a_tensor(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].output = 0  # here


@mistake(MisfitError, "None was written")
def none_for_a_tensor(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].hidden = None  # here


@mistake(MisfitError, r"h\.0\.input.*item 0 of item 0 of the value was .*31")
def an_input_of_another_shape(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].input = torch.zeros(2, 3, 31)  # here


@mistake(MisfitError, r"and Tensor.* was written|tuple")
def inputs_without_their_keywords(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].inputs = torch.zeros(2, 3, 32)  # here


# -- names -----------------------------------------------------------------------------------------


@mistake(UnknownModuleError, "'transformr' is not in GPT2LMHeadModel .*did you mean 'transformer'")
def a_misspelled_module(model: Model) -> None:
    with model.trace(IDS):
        model.transformr.h[0].output  # here


@mistake(UnknownModuleError, "'ouput' is not in GPT2Block .*did you mean 'output'")
def a_misspelled_value(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].ouput  # here


@mistake(UnknownModuleError, "'ouput' can't be assigned.*did you mean 'output'")
def a_misspelled_assignment(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].ouput = 0  # here


@mistake(UnknownModuleError, r"'model' is not in GPT2LMHeadModel.*\(there: transformer, lm_head\)")
def a_name_of_another_family(model: Model) -> None:
    with model.trace(IDS):
        model.model.layers[0].output  # here


@mistake(StepError, r"write `for step in tracer\.iter\[\.\.\.\]:`")
def a_with_in_the_place_of_a_loop(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[1:]:  # here
            model.lm_head.output


@mistake(UnknownModuleError, "'atn' is not in model.transformer.h.0.*did you mean 'attn'")
def a_misspelled_key(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0]["atn"].output  # here


@mistake(IndexError, r"model\.transformer\.h has 2 modules; there is no \[7\]")
def an_index_beyond_the_list(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[7].output  # here


@mistake(UnknownPathError, "'transformer.h.0.atn' .*did you mean '.*attn'")
def a_misspelled_path_of_a_cache(model: Model) -> None:
    with model.trace(IDS) as tracer:
        model.transformer.wte.output
        tracer.cache(["transformer.h.0.atn"])  # here


@mistake(UnknownPathError, "'transformer.h.0.atn'")
def a_misspelled_path_of_a_cache_alone(model: Model) -> None:
    with model.trace(IDS) as tracer:
        tracer.cache(["transformer.h.0.atn"])  # here


@mistake(UnknownPathError, r"the glob '\*\.layers\.\*' matches no module")
def a_glob_that_matches_nothing(model: Model) -> None:
    with model.trace(IDS) as tracer:
        tracer.cache("*.layers.*")  # here


@mistake(UnknownPathError, r"did you mean 'transformer\.h\.\*\.mlp'")
def a_misspelled_glob(model: Model) -> None:
    with model.trace(IDS) as tracer:
        tracer.cache("transformer.h.*.mpl")  # here


@mistake(MisfitError, r"write a pair of \(args, kwargs\), or assign to \.input")
def a_tensor_in_the_place_of_all_inputs(model: Model) -> None:
    with model.trace(IDS):
        model.transformer.h[0].inputs = torch.zeros(1)  # here


@mistake(CacheError, r"had passed model\.transformer\.h\.0 \(step 0\); make the cache first")
def a_cache_that_comes_too_late(model: Model) -> None:
    with model.trace(IDS) as tracer:
        model.lm_head.output
        tracer.cache("transformer.h.0")  # here


@mistake(OutsideTraceError, "model that this block is not tracing")
def a_value_of_another_model(model: Model) -> None:
    other = Model(nn.Linear(2, 2))
    with model.trace(IDS):
        model.transformer.h[0].output
        other.output  # here


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.make.__name__)
def test_a_mistake_is_an_error_at_its_line_and_leaves_the_model_as_it_was(
    case: Mistake, model: Model
) -> None:
    with pytest.raises(case.error, match=case.says) as caught:
        case.make(model)
    assert type(caught.value) is case.error
    lines = own_lines(caught.value, case.make.__name__)
    # a block that only makes caches runs in place: no line of a `with` above it
    assert lines[0].startswith("with model.") or len(lines) == 1
    assert [line.endswith("# here") for line in lines[1:]] == [True] * len(lines[1:])
    in_block = "# here" in source_of(case.make) and lines[0].startswith("with model.")
    assert len(lines) == (2 if in_block else 1)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    if isinstance(caught.value, TracekitError):
        assert str(caught.value).endswith(f"[{case.error.slug}]")


def source_of(function: Any) -> str:
    with open(__file__) as file:
        lines = file.read().splitlines()
    code = function.__code__
    last = max(line for *_, line in code.co_lines() if line)
    return "\n".join(lines[code.co_firstlineno - 1 : last])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 goes on with the lines it caught")
@pytest.mark.parametrize("name", ["output", "input", "inputs", "hidden"])
def test_a_value_outside_a_trace_is_an_error_at_the_users_line_alone(
    model: Model, name: str
) -> None:
    with pytest.raises(OutsideTraceError) as caught:
        getattr(model.lm_head, name)
    assert [entry.path.name for entry in caught.traceback] == ["test_errors.py"]


def test_an_error_in_a_handler_keeps_what_was_handled(model: Model) -> None:
    with pytest.raises(ValueError, match="from the block") as caught:
        try:
            1 / 0
        except ZeroDivisionError:
            with model.trace(IDS):
                model.output
                raise ValueError("from the block")  # noqa: B904
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_a_loop_that_reads_the_result_does_not_end_without_a_word(model: Model) -> None:
    with pytest.warns(ShortLoopWarning):  # noqa: PT031
        with model.generate(IDS, **GREEDY) as tracer:
            for _ in tracer.iter[:]:
                tracer.result  # after which no step is left
