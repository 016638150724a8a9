"""Lasting edits: in every run and every step, in order, of this model and of no other."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, changing, small, state_of
from tracekit import LanguageModel, Model, settings
from tracekit.errors import (
    CaptureError,
    MisfitError,
    NeverRanError,
    UnsupportedError,
)

IDS = torch.tensor([[11, 3, 7, 20]])


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return LanguageModel(make("gpt2")[0])


LOGITS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def logits(generated: Any) -> Tensor:
    """The logits of all steps: tokens of a random model hardly depend on anything."""
    return torch.stack(generated.logits)


def halved(model: Model, *where: nn.Module) -> Tensor:
    """The logits that the bare model has with the outputs of these modules halved by hooks."""
    handles = [
        module.register_forward_hook(lambda _module, _args, output: output / 2) for module in where
    ]
    try:
        return logits(model.module.generate(IDS, **LOGITS))
    finally:
        for handle in handles:
            handle.remove()


# -- what an edit reaches -----------------------------------------------------------------------


def test_an_edit_is_made_in_traces_and_calls_of_the_copy_and_never_in_the_model_itself() -> None:
    net = small()
    model = Model(net)
    before = net(X)
    with model.edit() as edited:
        model[0].output = model[0].output * 2
    with changing(net[0], lambda output: output * 2):
        expected = net(X)
    with edited.trace(X) as tracer:
        seen, result = edited[0].output, tracer.result
    with edited.trace(X) as tracer:
        cache = tracer.cache()
    assert torch.equal(edited(X), expected)
    assert torch.equal(result, expected)
    assert torch.equal(seen, net[0](X) * 2)
    assert torch.equal(cache["0"].output, net[0](X) * 2)
    assert torch.equal(model(X), before)
    with model.trace(X) as tracer:
        plain = tracer.result
    assert torch.equal(plain, before)
    assert edited.module is model.module and type(edited) is Model


def test_an_edit_is_made_in_every_step_of_a_generation_traced_or_not(gpt2: Model) -> None:
    with gpt2.edit() as edited:
        gpt2.transformer.h[0].output[:] /= 2
    expected = halved(gpt2, gpt2.module.transformer.h[0])
    with edited.generate(IDS, **LOGITS) as tracer:
        cache = tracer.cache(modules="transformer.h.0")
        tokens = tracer.result
    assert torch.equal(logits(edited.generate(IDS, **LOGITS)), expected)
    assert torch.equal(logits(tokens), expected)
    assert len(cache["transformer.h.0"]) == 4
    assert not torch.equal(logits(gpt2.generate(IDS, **LOGITS)), expected)


def test_edits_are_made_in_order_before_the_block_of_the_trace() -> None:
    model = Model(small())
    with model.edit() as once:
        model[0].output = model[0].output + 1
    with once.edit() as twice:
        once[0].output = once[0].output * 3
    with twice.trace(X) as tracer:
        seen = model[0].output
        model[0].output = seen - 1
        result = tracer.result
    first = model.module[0](X)
    assert torch.equal(seen, (first + 1) * 3)
    assert torch.equal(result, model.module[1:](seen - 1))
    assert [len(each.edits) for each in (model, once, twice)] == [0, 1, 2]


def test_either_name_of_the_model_means_its_modules_in_the_block() -> None:
    model = Model(small())
    with model.edit() as edited:
        edited[2].output = model[0].output
    assert torch.equal(edited(X), model.module[0](X))


def test_an_edit_in_place_is_made_in_the_model_itself_and_can_be_taken_away() -> None:
    model = Model(small())
    before = model(X)
    with model.edit(inplace=True) as same:
        same[2].output[:] = 0
    assert same is model
    assert not model(X).any()
    del model.edits[0]
    assert torch.equal(model(X), before)


def test_an_edit_skips_modules_and_calls_modules_that_are_not_of_the_model() -> None:
    net = small()
    model = Model(net)
    extra = nn.Linear(4, 4)
    with model.edit() as edited:
        model[1].skip(model[0].output)
        model[2].output = extra(model[2].output)
    assert torch.equal(edited(X), extra(net[2](net[0](X))))
    assert torch.equal(model(X), net(X))


def test_an_edited_model_has_gradients_through_its_edits() -> None:
    net = small()
    model = Model(net)
    with model.edit() as edited:
        model[0].output = model[0].output * 3
    edited(X).sum().backward()
    found = net[0].weight.grad
    net.zero_grad()
    with changing(net[0], lambda output: output * 3):
        net(X).sum().backward()
    assert found is not None and torch.equal(found, net[0].weight.grad)


def test_within_an_edit_the_model_is_unedited_so_that_it_may_run_it() -> None:
    model = Model(small())
    with model.edit() as edited:
        edited[2].output = edited[2].output - edited(X)
    assert not edited(X).any()


def test_a_copy_of_a_model_without_its_weights_brings_them_for_both() -> None:
    late = LanguageModel("tracekit/tiny", dispatch=False)
    with late.edit() as edited:
        late.transformer.h[0].output[:] = 0
    changed = edited("The Eiffel Tower").logits
    late.dispatch()
    assert late.module is edited.module
    whole = LanguageModel("tracekit/tiny")
    assert torch.equal(late("The Eiffel Tower").logits, whole("The Eiffel Tower").logits)
    with changing(whole.transformer.h[0].module, torch.zeros_like):
        assert torch.equal(changed, whole("The Eiffel Tower").logits)


# -- the names of the block ---------------------------------------------------------------------


def test_names_are_taken_when_the_edit_is_made() -> None:
    model = Model(small())
    factor = 2
    with model.edit() as edited:
        model[2].output = model[2].output * factor
    first = edited(X)
    factor = 100
    assert torch.equal(edited(X), first)
    assert factor == 100


def test_what_the_block_binds_is_not_handed_back_and_every_run_begins_anew() -> None:
    model = Model(small())
    count = 0
    seen: list[int] = []
    with model.edit() as edited:
        count += 1
        seen.append(count)
        model[2].output[:] = count
    edited(X), edited(X)
    assert count == 0
    assert seen == [1, 1]


def test_nested_functions_comprehensions_and_helpers_work_in_an_edit() -> None:
    model = Model(small())

    def scaled(value: Tensor) -> Tensor:
        return value * weights[0]

    weights = [2, 3]
    with model.edit() as edited:

        def twice(value: Tensor) -> Tensor:
            return scaled(scaled(value)) * sum(weight for weight in weights)

        for layer in [model[index] for index in (0, 2)]:
            layer.output = twice(layer.output)
    with changing(model.module[0], lambda v: v * 20), changing(model.module[2], lambda v: v * 20):
        expected = model.module(X)
    assert torch.equal(edited(X), expected)


def test_a_function_is_an_edit_too_and_sees_its_names_as_they_are_when_it_runs() -> None:
    model = Model(small())
    factor = 2

    def scale(given: Any) -> None:
        given[2].output = given[2].output * factor

    edited = model.edit(scale)
    plain = model(X)
    assert torch.equal(edited(X), plain * 2)
    factor = 3
    assert torch.equal(edited(X), plain * 3)
    model.edits.add(scale)
    assert torch.equal(model(X), plain * 3)


# -- steps ----------------------------------------------------------------------------------------


def test_an_edit_for_some_steps_loops_over_them_with_a_tracer_of_its_own(gpt2: Model) -> None:
    with gpt2.edit() as (tracer, edited):
        for _ in tracer.iter[1:3]:
            gpt2.transformer.h[0].output[:] *= -1
    with gpt2.generate(IDS, **LOGITS) as tracer:
        for _ in tracer.iter[1:3]:
            gpt2.transformer.h[0].output[:] *= -1
        expected = tracer.result
    expected = logits(expected)
    assert not torch.equal(expected, logits(gpt2.generate(IDS, **LOGITS)))
    assert torch.equal(logits(edited.generate(IDS, **LOGITS)), expected)


def test_naming_a_tracer_does_not_make_an_edit_of_the_first_step_alone(gpt2: Model) -> None:
    with gpt2.edit() as (_, edited):
        gpt2.transformer.h[0].output[:] /= 2
    expected = halved(gpt2, gpt2.module.transformer.h[0])
    assert torch.equal(logits(edited.generate(IDS, **LOGITS)), expected)


def test_an_edit_of_what_runs_in_some_steps_alone_is_made_in_those() -> None:
    module, inputs = make("t5")
    model = LanguageModel(module)
    options = {**inputs, **LOGITS}
    plain = logits(model.generate(**options))
    with model.edit() as edited:
        model.encoder.block[0].layer[0].SelfAttention.o.output[:] *= -3
    with edited.edit() as both:
        both.decoder.block[0].layer[0].SelfAttention.o.output[:] *= -3

    def flipped(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * -3

    first = module.encoder.block[0].layer[0].SelfAttention.o.register_forward_hook(flipped)
    expected = logits(model.generate(**options))
    second = module.decoder.block[0].layer[0].SelfAttention.o.register_forward_hook(flipped)
    expected_of_both = logits(model.generate(**options))
    first.remove(), second.remove()
    with edited.generate(**options) as tracer:
        tokens = tracer.result
    assert torch.equal(logits(edited.generate(**options)), expected)
    assert torch.equal(logits(both.generate(**options)), expected_of_both)
    assert torch.equal(logits(tokens), expected)
    assert not torch.equal(expected, plain) and not torch.equal(expected, expected_of_both)
    assert torch.equal(logits(model.generate(**options)), plain)


def test_an_edit_that_would_be_missed_in_some_steps_is_refused() -> None:
    module, inputs = make("t5")
    model = LanguageModel(module)
    with model.edit() as edited:
        model.encoder.block[0].output
        model.decoder.block[0].layer[0].SelfAttention.o.output[:] = 0
    with pytest.raises(UnsupportedError, match="make two edits of it"):
        edited.generate(**inputs, max_new_tokens=4)
    edited(**inputs)  # of one step: it is made


# -- guards ---------------------------------------------------------------------------------------


class Sometimes(nn.Module):
    """Runs its second part only if it is told to, and its third never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: Tensor, both: bool) -> Tensor:
        value = self.first(value)
        return self.second(value) if both else value


def test_an_edit_that_was_never_made_is_an_error_at_its_own_line() -> None:
    model = Model(Sometimes())
    with model.edit() as edited:
        model.second.output[:] = 0
    assert not edited(X, both=True).any()
    with pytest.raises(NeverRanError) as caught:
        edited(X, both=False)
    with pytest.raises(NeverRanError):
        with edited.trace(X, both=False):
            pass
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert lines == ["edited(X, both=False)", "model.second.output[:] = 0"]


def test_a_run_that_the_trace_stops_need_not_come_to_the_edit() -> None:
    model = Model(small())
    with model.edit() as edited:
        model[2].output[:] = 0
    with edited.trace(X) as tracer:
        early = model[0].output
        tracer.stop()
    assert torch.equal(early, model.module[0](X))


def test_an_edit_within_what_the_trace_skips_is_an_error() -> None:
    model = Model(nn.Sequential(small(), nn.ReLU()))
    with model.edit() as edited:
        model[0][2].output[:] = 0
    with pytest.raises(NeverRanError, match="was skipped"):
        with edited.trace(X):
            model[0].skip(X)


def test_an_error_in_an_edit_shows_the_call_and_the_line_of_the_edit() -> None:
    model = Model(small())
    with model.edit() as edited:
        model[0].output = torch.zeros(1)
    before = state_of(model.module)
    with pytest.raises(MisfitError) as caught:
        edited(X)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert lines == ["edited(X)", "model[0].output = torch.zeros(1)"]
    assert state_of(model.module) == before


def test_an_edit_has_no_result_no_stop_and_no_cache() -> None:
    model = Model(small())
    with model.edit() as (tracer, reads):
        tracer.result
    with model.edit() as (tracer, stops):
        tracer.stop()
    with model.edit() as (tracer, records):
        tracer.cache()
    for edited, name in ((reads, "result"), (stops, "stop"), (records, "cache")):
        with pytest.raises(UnsupportedError, match=f"tracer.{name}"):
            edited(X)


def test_a_block_that_cannot_be_captured_names_the_function_as_the_way_out() -> None:
    model = Model(small())

    def returns() -> Any:
        with model.edit():
            return model[0].output

    with pytest.raises(CaptureError, match=r"model\.edit\(function\)"):
        returns()
    with pytest.raises(CaptureError, match="an empty block edits nothing"):
        with model.edit():
            pass
    assert not model.edits


def test_an_error_where_the_with_stands_keeps_no_edit() -> None:
    model = Model(small())
    with pytest.raises(UnsupportedError, match="not int"):
        model.edit(3, inplace=True)  # type: ignore[call-overload]
    assert not model.edits


# -- the list of edits ----------------------------------------------------------------------------


def test_edits_are_listed_with_their_source_and_line() -> None:
    model = Model(small())
    with model.edit(inplace=True):
        # of the last layer
        model[2].output[:] = 0
    (edit,) = model.edits
    assert edit.source == "model[2].output[:] = 0\n"
    assert edit.filename == __file__
    with open(__file__) as file:
        assert file.readlines()[edit.line - 1].strip() == "model[2].output[:] = 0"
    assert f"{__file__}:{edit.line}: model[2].output[:] = 0" in repr(model.edits)


def test_edits_are_removed_by_index_by_themselves_or_all_at_once() -> None:
    model = Model(small())
    for number in range(4):
        with model.edit(inplace=True):
            model[2].output[:] = number
    model.edits.remove(0)
    model.edits.remove(model.edits[1])
    assert [edit.names["number"] for edit in model.edits] == [1, 3]
    assert (model(X) == 3).all()
    with pytest.raises(ValueError, match="not in"):
        model.edits.remove(Model(small()).edit(_nothing).edits[0])
    with pytest.raises(IndexError, match=r"there is no \[3\]"):
        model.edits.remove(3)
    model.edits.clear()
    assert torch.equal(model(X), model.module(X))


def _nothing(_: Any) -> None: ...


# -- lifetime -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_collector")
def test_an_edited_model_that_is_dropped_frees_what_its_edits_held() -> None:
    model = Model(small())

    class Noted(nn.Module):
        def __del__(self) -> None:
            freed.append(True)

        def forward(self, value: Tensor) -> Tensor:
            return value

    freed: list[bool] = []
    extra = Noted()
    with model.edit() as edited:
        edited[2].output = extra(model[2].output)
    with edited.trace(X):
        edited[2].output
    edited(X)
    with pytest.raises(NeverRanError):
        with edited.edit() as never:
            never[0].calls[3].output
        never(X)
    del extra, never
    assert not freed
    del edited
    assert freed


# -- beside blocks that stand in place ------------------------------------------------------------


def test_edits_come_before_a_block_that_stands_in_place_too(gpt2: Model) -> None:
    model = Model(small())
    with model.edit() as edited:
        model[0].output = model[0].output + 1
    with settings.changed(lift_blocks=False):
        with edited.trace(X) as tracer:
            seen = model[0].output
            model[0].output = seen * 2
            result = tracer.result
    first = model.module[0](X) + 1
    assert torch.equal(seen, first)
    assert torch.equal(result, model.module[1:](first * 2))
    with gpt2.edit() as halving:
        gpt2.transformer.h[0].output[:] /= 2
    with settings.changed(lift_blocks=False):
        with halving.generate(IDS, **LOGITS) as tracer:
            last = [gpt2.lm_head.output[:, -1] for _ in tracer.all()]
    assert torch.equal(torch.stack(last), halved(gpt2, gpt2.module.transformer.h[0]))


# -- beside everything else -----------------------------------------------------------------------


@pytest.mark.parametrize("has_own_steps", [False, True])
def test_a_trace_that_stops_stops_the_run_of_an_edited_model_too(
    gpt2: Model, has_own_steps: bool
) -> None:
    if has_own_steps:
        with gpt2.edit() as (tracer, edited):
            for _ in tracer.iter[:]:
                gpt2.transformer.h[0].output[:] /= 2
    else:
        with gpt2.edit() as edited:
            gpt2.transformer.h[0].output[:] /= 2
    calls: list[int] = []
    handle = gpt2.lm_head.module.register_forward_hook(lambda *_: calls.append(1))
    with edited.generate(IDS, max_new_tokens=4) as tracer:
        gpt2.transformer.h[0].output
        tracer.stop()
    handle.remove()
    assert not calls


def test_an_edit_sees_the_whole_batch_of_several_invokes(gpt2: Model) -> None:
    with gpt2.edit() as edited:
        gpt2.transformer.h[0].output[:] /= 2
    with edited.trace() as tracer:
        with tracer.invoke(IDS):
            seen = gpt2.transformer.h[0].output
            first = gpt2.lm_head.output[:, -1]
        with tracer.invoke(IDS[:, :2]):
            second = gpt2.lm_head.output[:, -1]
    with gpt2.trace(IDS):
        whole = gpt2.transformer.h[0].output
    torch.testing.assert_close(seen, whole / 2)
    torch.testing.assert_close(first, edited(IDS).logits[:, -1])
    torch.testing.assert_close(second, edited(IDS[:, :2]).logits[:, -1])


def test_a_dry_run_finds_an_edit_that_does_not_fit() -> None:
    model = Model(small())
    with model.edit() as edited:
        model[0].output = model[0].output[:, :2]
    with pytest.raises(MisfitError):
        with edited.scan(X):
            pass


@pytest.mark.parametrize("inputs", [1, 2])
def test_an_edit_has_what_it_read_though_a_later_block_changes_that_in_place(inputs: int) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(inputs, 4)
    model = Model(net)
    with model.edit() as edited:
        kept = model[0].output
        model[1].output = kept
    if inputs == 1:
        with edited.trace(x):
            edited[0].output[:] = 1.0
            first, out = edited[1].input, edited.output
    else:
        with edited.trace() as tracer:
            with tracer.invoke(x[:1]):
                edited[0].output[:] = 1.0
                first = edited[1].input
            with tracer.invoke(x[1:]):
                edited[2].output.clone()
            with tracer.invoke():
                out = edited.output
    assert bool((first == 1).all())
    torch.testing.assert_close(out, net[2](net[0](x)))


def test_an_edit_in_place_reaches_what_shares_the_memory_of_its_value() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            return self.part(h) + h

    model = Model(Residual())
    with model.edit() as edited:
        model.part.output[:] += 1
    x = torch.randn(2, 4)
    with edited.trace(x):
        out = edited.output
    torch.testing.assert_close(out, 2 * (x * 2 + 1))
    torch.testing.assert_close(edited(x), out)
