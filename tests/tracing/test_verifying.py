"""Verified edits: honest ones of every form pass, and each planted fault is named by the report."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.tiny_models import IS_TRANSFORMERS_5, SPECS, make
from tracekit import KeyValueCache, LanguageModel, Model, settings
from tracekit.errors import (
    CacheError,
    InputError,
    LostError,
    NeverRanError,
    SiteOrderError,
    UnsupportedError,
)
from tracekit.testing import assert_edit
from tracekit.tracing.verified.report import EditReport

TOWER = "The Eiffel Tower is in the city of"
LOUVRE = "The Louvre is in the city of"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def slugs(report: EditReport) -> list[str]:
    return [problem.slug for problem in report.problems]


def hooks_on(module: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(each, name)) for each in module.modules() for name in names)


# -- planted faults --------------------------------------------------------------------------------


def test_an_edit_one_position_off_is_named_with_the_tokens(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=dict(positions=[3])) as tracer:
        model.transformer.h[1].hidden[:, 4] = 0
    assert slugs(tracer.report) == ["wrong-position", "missed-position"]
    assert "position 4 'is' of row 0, and position 3 'Tower' was meant" in repr(tracer.report)


def test_a_name_that_is_bound_anew_between_two_writes_does_not_go_on(model: LanguageModel) -> None:
    with model.trace(TOWER):
        clean = model.layers[0].z.clone()
    with model.trace(TOWER, verify=True) as tracer:
        for head in (0, 3):
            without = clean.clone()
            without[:, :, head] = 0
            model.layers[0].z = without
    assert slugs(tracer.report) == ["overwritten"]
    with model.trace(TOWER, verify=True) as tracer:
        without = clean.clone()
        for head in (0, 3):
            without[:, :, head] = 0
            model.layers[0].z = without
    assert tracer.report, tracer.report


def test_without_an_intent_the_report_lists_positions_with_their_tokens(
    model: LanguageModel,
) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden[:, 4] = 0
    assert tracer.report
    assert "row 0, position 4 'is'" in repr(tracer.report)
    assert slugs(tracer.report.expect(positions=[3])) == ["wrong-position", "missed-position"]
    missed = tracer.report.expect(positions=[1, 3]).problems[-1].text
    assert missed.endswith("of row 0 were meant, and no edit touched them.")
    assert tracer.report.expect(positions=[-5], rows=[0], modules="transformer.h.1")


def test_positions_of_a_padded_row_are_its_own(model: LanguageModel) -> None:
    with model.trace([TOWER, LOUVRE], verify=True) as tracer:
        model.transformer.h[1].hidden[1, -1] = 0
    [landing] = tracer.report.edits[0].landings
    tokens = model.to_str_tokens(LOUVRE)
    assert landing.rows[0].positions == (len(tokens) - 1,)
    assert landing.rows[0].tokens == (tokens[-1],)


def test_an_edit_on_the_wrong_row_is_named(model: LanguageModel) -> None:
    with model.trace([TOWER, LOUVRE], verify=dict(rows=[0])) as tracer:
        model.transformer.h[1].hidden[1] = 0
    assert slugs(tracer.report) == ["wrong-row", "missed-row"]
    assert [row.verdict for row in tracer.report.rows] == ["bit-identical", "edited"]


def test_an_edit_of_the_wrong_layer_is_named(model: LanguageModel) -> None:
    report = model.verify(("transformer.h.2", 0.0), TOWER, modules="transformer.h.1")
    assert slugs(report) == ["wrong-module", "missed-module"]


def test_an_edit_before_its_value_exists_is_an_error_and_in_the_report(
    model: LanguageModel,
) -> None:
    with pytest.raises(SiteOrderError):
        with model.trace(TOWER, verify=True) as tracer:
            model.transformer.h[2].hidden[:, 0] = 0
            model.transformer.h[1].hidden[:] = 0
    assert slugs(tracer.report) == ["site-order"]
    assert tracer.report.edits[0].is_right  # what came before it landed


def test_an_edit_that_a_later_line_overwrites_is_named_with_that_line(
    model: LanguageModel,
) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden[:, 2] = 0
        model.transformer.h[1].hidden[:, 1:4] = 7
    assert slugs(tracer.report) == ["overwritten"]
    first, second = tracer.report.edits
    assert first.landings[0].overwritten_by == f"line {second.line}"
    assert second.is_right


def test_an_edit_that_a_later_assignment_replaces_is_named(model: LanguageModel) -> None:
    with model.trace(TOWER):
        clean = model.transformer.h[1].hidden.clone()
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden[:, 2] = 0
        model.transformer.h[1].hidden = clean
    assert slugs(tracer.report) == ["overwritten"]


def test_a_lasting_edit_that_the_trace_overwrites_is_named(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.transformer.h[1].hidden[:] = 0
    with edited.trace(TOWER, verify=True) as tracer:
        edited.transformer.h[1].hidden = torch.ones(1, 9, 128)
    assert slugs(tracer.report) == ["overwritten"]


def test_an_edit_that_goes_on_from_an_earlier_one_is_no_fault(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden[:] += 1
        model.transformer.h[1].hidden *= 2
        model.transformer.h[1].hidden = model.transformer.h[1].hidden + 3
    assert tracer.report
    assert len(tracer.report.edits) == 3
    assert "changed again by line" in repr(tracer.report)


class Bypass(nn.Module):
    """Calls a module, and computes with its weights past it, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.last(functional.linear(x, self.inner.weight, self.inner.bias))


class Keeps(nn.Module):
    """Goes on with what a module gave before hooks were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.inner.forward(x)
        self.inner(x)
        return self.last(kept)


@pytest.mark.parametrize("kind", [Bypass, Keeps])
def test_an_edit_that_a_fused_path_loses_is_named(kind: type[nn.Module]) -> None:
    report = Model(kind()).verify(("inner", lambda h: h * 2), torch.ones(3, 4))
    assert slugs(report) == ["lost"]
    assert report.edits[0].landings[0].elements[0]  # it fired, and changed its value


def test_an_edit_of_a_module_that_attention_never_calls_never_fired() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        report = Model(attention).verify(("self_attn.out_proj", 0.0), torch.ones(2, 5, 8))
        honest = Model(attention).verify(("linear1", lambda h: h + 1), torch.ones(2, 5, 8))
    assert slugs(report) == ["never-fired"]
    assert report.edits[0].fired == 0
    assert honest


def test_a_hook_at_a_module_that_did_not_run_never_fired() -> None:
    model = Model(Skips())

    def other() -> None:
        model.other.output[:] = 0

    for edit in (("other", zeroed_alone), other):
        assert slugs(model.verify(edit, torch.ones(2, 4))) == ["never-fired"]
    with pytest.raises(NeverRanError), model.trace(torch.ones(2, 4), verify=True) as tracer:
        model.other.output[:] = 0
    assert slugs(tracer.report) == ["never-fired"]
    placed = model.verify([("one", lambda h: h + 1), ("other", 0.0)], torch.ones(2, 4))
    assert [edit.fired for edit in placed.edits] == [1, 0]
    assert [edit.verdict for edit in placed.edits] == ["as written", "never-fired"]


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="routers give logits from transformers 5 on")
def test_an_edit_of_the_routers_logits_is_lost_and_an_error_where_it_is_a_copy() -> None:
    module, inputs = make("mixtral")
    model = Model(module)

    def raw() -> None:
        model.model.layers[0].mlp.gate.output[0][:] = 0

    assert slugs(model.verify(raw, **inputs)) == ["lost"]
    with pytest.raises(LostError, match="nothing in the model reads it again"):
        with model.trace(**inputs, verify=True) as tracer:
            model.layers[0].router_logits[:] = 0
    assert slugs(tracer.report) == ["lost"]
    with model.trace(**inputs):
        model.layers[0].router_logits.sum()  # reading is no edit


@pytest.mark.parametrize("has_another", [True, False])
def test_a_value_that_is_changed_when_the_model_has_gone_on_is_named(
    model: LanguageModel, has_another: bool
) -> None:
    def late() -> None:
        value = model.layers[1].mlp_out
        later = model.layers[2].resid_post
        value[:] = 0
        if has_another:
            later[:] = 0

    report = model.verify(late, TOWER)
    assert slugs(report) == ["late"]
    assert "h.1.mlp.output was changed in place" in repr(report)
    assert "when the model had gone on to model.transformer.h.2.output" in repr(report)


def test_memory_that_a_later_value_shares_may_be_changed_there(model: LanguageModel) -> None:
    def shared() -> None:
        before = model.layers[0].resid_post
        value = model.layers[1].resid_pre  # the same tensor
        value[0, 1] = before[0, 2]
        kept = model.layers[1].mlp_out
        model.layers[1].resid_post = kept
        kept[0, 3] = 0

    assert model.verify(shared, TOWER)


def test_a_write_that_goes_on_from_the_name_that_was_edited_is_no_fault(
    model: LanguageModel,
) -> None:
    def every_layer() -> None:
        for layer in model.layers:
            value = layer.resid_post
            value[0, 2] += 1
            layer.resid_post = value * 1.1

    assert model.verify(every_layer, TOWER)


def test_an_edit_that_changes_nothing_is_named(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden = model.transformer.h[1].hidden * 1
        model.transformer.h[2].hidden[:, 0] += 0
    assert slugs(tracer.report) == ["changed-nothing", "changed-nothing"]
    assert repr(tracer.report).count("nothing changed") == 2


def test_a_run_in_which_nothing_is_edited_says_so(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden.sum()
    assert slugs(tracer.report) == ["no-edit"]
    assert not tracer.report


def test_a_row_that_changes_though_it_was_not_edited_is_named() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(x).mean(0)

    model = Model(nn.Sequential(Mixes(), nn.Linear(4, 4)))

    def edit() -> None:
        model[0].inner.calls[1].output[1] += 5

    report = model.verify(edit, torch.randn(3, 4))
    assert slugs(report) == ["other-rows", "other-rows"]
    assert [row.verdict for row in report.rows] == ["changed", "edited", "changed"]


def test_what_differs_before_the_edit_is_named() -> None:
    class Counts(nn.Module):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += self.count < 3
            return x + max(0, self.count - 2)

    model = Model(nn.Sequential(Counts(), nn.Linear(4, 4), nn.Linear(4, 4)))
    report = model.verify(("1", lambda h: h * 2), torch.ones(2, 4))
    assert "changed-before" in slugs(report)
    assert report.changed_before[0].site == "model.0.output"


# -- precision -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half() -> LanguageModel:
    return LanguageModel("tracekit/tiny", dtype=torch.bfloat16)


def test_an_edit_below_the_rounding_of_bfloat16_is_named(half: LanguageModel) -> None:
    report = half.verify(("transformer.h.1", lambda h: h * 1.001), TOWER)
    assert slugs(report) == ["precision-only"]
    assert report.precision is not None
    assert report.precision.effect == 0.0 < report.precision.effect_in_float32
    with half.trace(TOWER, verify=True) as tracer:
        half.transformer.h[1].hidden[:] *= 1.001
    assert slugs(tracer.report) == ["changed-nothing"]
    assert "In bfloat16, a change that is smaller than its rounding" in repr(tracer.report)


def test_an_honest_edit_in_bfloat16_has_the_same_effect_in_float32(half: LanguageModel) -> None:
    report = half.verify((("resid_post", 1), lambda h, hook: h * 0.5), TOWER)
    assert report
    assert report.precision is not None
    assert report.precision.effect == pytest.approx(report.precision.effect_in_float32, abs=0.02)
    assert half.dtype is torch.bfloat16
    assert all(weight.dtype is torch.bfloat16 for weight in half.module.parameters())


def test_a_change_of_one_rounding_in_float32_is_named(model: LanguageModel) -> None:
    def edit() -> None:
        out = model.transformer.h[1].hidden
        model.transformer.h[1].hidden = torch.nextafter(out, out + 1)

    assert slugs(model.verify(edit, TOWER)) == ["precision-only"]


# -- honest edits ----------------------------------------------------------------------------------


def plain(module: nn.Module, path: str, change: Callable[[Tensor], Tensor], **inputs: Any) -> Any:
    """The logits without and with a plain hook."""

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    with torch.no_grad():
        clean = module(**inputs).logits
        handle = module.get_submodule(path).register_forward_hook(hook)
        edited = module(**inputs).logits
        handle.remove()
    return clean, edited


def test_the_logits_part_is_what_plain_hooks_and_other_formulas_give(
    model: LanguageModel,
) -> None:
    report = model.verify(("transformer.h.2.mlp", lambda h: h * -1), TOWER)
    inputs = dict(model.to_inputs(TOWER), use_cache=False)
    clean, edited = plain(model.module, "transformer.h.2.mlp", lambda h: h * -1, **inputs)
    p, q = clean[0].softmax(-1), edited[0].softmax(-1)
    assert report
    assert report.logits is not None
    variation = torch.tensor(report.logits.total_variation[0])
    torch.testing.assert_close(variation, (p - q).clamp(min=0).sum(-1), rtol=1e-3, atol=1e-6)
    divergence = functional.kl_div(edited[0].log_softmax(-1), p, reduction="none").sum(-1)
    found = torch.tensor(report.logits.divergence[0])
    torch.testing.assert_close(found, divergence, rtol=1e-3, atol=1e-6)
    moved = (clean[0].argmax(-1) != edited[0].argmax(-1)).nonzero().flatten().tolist()
    assert [flip.position for flip in report.logits.flips] == moved
    assert moved
    size = (edited - clean).norm() / clean.norm()
    assert report.result == pytest.approx(float(size), rel=1e-4)


def test_how_large_an_edit_is_is_told_beside_the_clean_value(model: LanguageModel) -> None:
    with model.trace(TOWER):
        clean = model.transformer.h[1].hidden.detach().clone()
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].hidden[:, 3, :16] += 2
    [landing] = tracer.report.edits[0].landings
    assert landing.features == (16, 128)
    assert landing.elements == (16, 9 * 128)
    assert landing.absolute == pytest.approx(2 * 16**0.5, rel=1e-5)
    assert landing.relative == pytest.approx(8 / float(clean[0, 3, :16].norm()), rel=1e-4)
    assert landing.largest == pytest.approx(2, rel=1e-5)


def test_the_first_value_that_differs_comes_right_behind_the_edit(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=True) as tracer:
        model.transformer.h[1].attn.output[0][:, 2] += 1
    report = tracer.report
    assert report.first is not None
    assert report.first.site == "model.transformer.h.1.ln_2.input"
    assert not report.changed_before
    assert report.before + len(report.after) + report.unchanged_after + 1 == 2 * calls(model)


def calls(model: LanguageModel) -> int:
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [each.register_forward_hook(hook) for each in model.module.modules()]
    model.module(model.to_tokens(TOWER))
    for handle in handles:
        handle.remove()
    return count


def test_every_form_of_edit_in_one_trace_lands(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].mlp.output[:, -1] = 0
    hooks = [(("z", 0), lambda z, hook: z * 2), ("resid_pre", lambda x, hook: None)]
    with edited.hooks(fwd_hooks=hooks), edited.trace(TOWER, verify=True) as tracer:
        cache = tracer.cache()
        edited.layers[1].mlp_in[:] += 1
        edited.transformer.h[1].mlp.hidden *= 2
        edited.transformer.h[2].mlp.skip(edited.transformer.h[2].mlp.input)
        edited.layers[3].resid_pre = edited.layers[3].resid_pre * 3
        edited.transformer.h[3].output.at([2, -1])[:] += 1
        edited.lm_head.output[..., 5] = 0
    report = tracer.report
    assert report, report
    kinds = {edit.kind for edit in report.edits}
    assert kinds == {"hook", "in place", "skip", "positions", "assigned"}
    assert len(report.edits) == 8
    landings = [each for edit in report.edits for each in edit.landings]
    assert {each.in_cache for each in landings if each.site.endswith(".output")} == {True}
    assert {each.is_there for each in landings} == {True}
    assert cache


def test_invokes_are_told_apart_and_the_others_stay(model: LanguageModel) -> None:
    with model.trace(verify=True) as tracer:
        with tracer.invoke(TOWER):
            model.transformer.h[1].mlp.output[:, 3] *= 2
        with tracer.invoke(LOUVRE):
            cache = tracer.cache()
            model.layers[2].attn_out += 3
        with tracer.invoke("Paris"):
            model.lm_head.output.sum()
    report = tracer.report
    assert report, report
    assert [edit.invoke for edit in report.edits] == [0, 1]
    assert [row.verdict for row in report.rows] == ["edited", "edited", "bit-identical"]
    assert [row.invoke for row in report.rows] == [0, 1, 2]
    assert report.edits[0].landings[0].rows[0].tokens == ("Tower",)
    assert [touched.row for touched in report.edits[1].landings[0].rows] == [1]
    assert report.edits[1].landings[0].in_cache
    assert cache


def test_a_verified_trace_gives_what_the_trace_gives() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model, x = Model(module.train()), torch.randn(6, 4)
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def run(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
        module.load_state_dict(state)
        torch.manual_seed(1)
        with model.trace(x, **options):
            model[0].output[2] = 0
            out = model.output.clone()
        return out, torch.rand(1), module[1].running_mean.clone()  # pyright: ignore

    for one, other in zip(run(), run(verify=True), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_left_on_the_model_nor_of_the_values(model: LanguageModel) -> None:
    def run() -> Any:
        with model.trace(TOWER, verify=True) as tracer:
            model.transformer.h[1].hidden[:] = 0
        return ref(tracer), tracer.report

    run()
    before = hooks_on(model.module)
    gc.collect()
    gc.disable()
    try:
        tracer, report = run()
        assert tracer() is None
        assert not any(isinstance(each, Tensor) for each in vars(report).values())
    finally:
        gc.enable()
    assert hooks_on(model.module) == before == 0


def test_keys_and_values_that_are_given_grow_once(model: LanguageModel) -> None:
    from transformers import DynamicCache

    kept = DynamicCache()
    with model.trace(TOWER, past_key_values=kept, use_cache=True, verify=True) as tracer:
        model.transformer.h[1].hidden[:, 3] = 0
    assert tracer.report
    assert kept.get_seq_length() == 9


def test_a_run_behind_a_prefix_is_verified_and_a_cache_that_would_grow_is_refused(
    model: LanguageModel,
) -> None:
    prefix = model.prefill("The Eiffel Tower is")
    with model.trace(" in the city of", prefix=prefix, verify=True) as tracer:
        model.transformer.h[1].hidden[:, -1] = 0
    assert tracer.report, tracer.report
    with pytest.raises(UnsupportedError, match="would grow each time"):
        model.trace(" in", prefix=KeyValueCache.init(model), verify=True)


@pytest.mark.parametrize("is_lifted", [True, False])
def test_a_block_in_place_and_a_function_are_verified(
    model: LanguageModel, is_lifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "lift_blocks", is_lifted)
    with model.trace(TOWER, verify=True) as tracer:
        cache = tracer.cache("transformer.h.1")
        model.transformer.h[1].hidden[:, 3] = 0
        model.transformer.h[2].mlp.skip(model.transformer.h[2].mlp.input)
    assert tracer.report, tracer.report
    assert tracer.report.edits[0].landings[0].in_cache
    assert len(cache["transformer.h.1"]) == 1
    traced = model.trace(TOWER, verify=True)
    traced.run(lambda: model.transformer.h[1].hidden.zero_())
    assert traced.report


def test_of_values_beyond_the_budget_it_is_known_that_they_differ(model: LanguageModel) -> None:
    with model.trace(TOWER, verify=dict(budget=0)) as tracer:
        model.transformer.h[1].hidden[:, 3] = 0
    report = tracer.report
    assert report
    assert len(report.after) > 20
    assert {change.largest for change in report.after} == {None}
    assert "kept as digests" in repr(report)


def test_only_modules_that_are_watched_are_compared(model: LanguageModel) -> None:
    report = model.verify(("transformer.h.1", 0.0), TOWER, watch=["transformer.h.1", "lm_head"])
    assert report
    assert {change.site for change in report.after} == {
        "model.lm_head.input",
        "model.lm_head.output",
    }


# -- what can be given -----------------------------------------------------------------------------


def test_all_that_the_library_knows_as_an_edit_can_be_given(model: LanguageModel) -> None:
    def block(tracer: Any) -> None:
        tracer.cache()
        model.transformer.h[1].hidden[:, 3] = 0

    edited = model.edit(lambda m: m.transformer.h[1].hidden[:, 3].zero_())
    pair = (("resid_post", 1), zeroed)
    for edit in (block, edited, edited.edits[0], pair, ("transformer.h.1", zeroed_alone), [pair]):
        report = assert_edit(model, edit, TOWER, rows=0, positions=3, modules="transformer.h.1")
        assert len(report.edits) == 1
        assert report.edits[0].fired == 1
    placed = model.transformer.h[1].output.at(3)
    assert_edit(model, (placed, 0.0), TOWER, rows=0, positions=3)
    hook = model.add_hook(("resid_post", 1), zeroed)
    hook.remove()
    both = model.verify([("transformer.h.0.mlp", 0.0), block], TOWER)
    assert [edit.kind for edit in both.edits] == ["function", "in place"]


def zeroed(value: Tensor, hook: Any) -> Tensor:
    return zeroed_alone(value)


def zeroed_alone(value: Tensor) -> Tensor:
    value = value.clone()
    value[:, 3] = 0
    return value


def test_assert_edit_fails_with_the_text_of_the_report(model: LanguageModel) -> None:
    with pytest.raises(AssertionError, match="wrong-position") as caught:
        assert_edit(model, ("transformer.h.1", zeroed_alone), TOWER, positions=[2])
    assert "position 3 'Tower' of row 0, and position 2 'Eiffel' was meant" in str(caught.value)


def test_what_is_no_edit_is_refused(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="verify\\(\\) takes an edited model"):
        model.verify(3, TOWER)
    with pytest.raises(InputError, match="no lasting edits"):
        model.verify(model, TOWER)
    with pytest.raises(InputError, match="did you mean 'positions'"):
        model.trace(TOWER, verify=dict(position=3))
    with pytest.raises(InputError, match="input, check_precision=True"):
        model.trace(TOWER, verify=dict(check_precision=True))
    with pytest.raises(UnsupportedError, match="verify="):
        model.generate(TOWER, max_new_tokens=2, verify=True)
    with model.trace(TOWER) as tracer:
        pass
    with pytest.raises(CacheError, match="verify=True"):
        tracer.report


def test_the_text_counts_only_what_there_is(model: LanguageModel) -> None:
    text = repr(model.verify(("transformer.h.1", 0.0), TOWER))
    assert "fired: as written" in text
    assert " do not;" not in text
    assert "not edited" not in text
    with model.trace([TOWER, TOWER], verify=True) as tracer:
        model.transformer.h[1].hidden[0] = 0
    assert "  not edited: row 1, bit-identical" in repr(tracer.report)


def test_the_report_is_json(model: LanguageModel) -> None:
    report = model.verify(("transformer.h.1", 0.0), TOWER)
    told = json.loads(json.dumps(report.to_json()))
    assert told["verdict"] == "VERIFIED"
    assert told["edits"][0]["landings"][0]["site"] == "model.transformer.h.1.output"
    assert len(told["logits"]["total_variation"][0]) == 9


# -- other families --------------------------------------------------------------------------------

FAMILIES = (
    "llama",
    "gpt_neox",
    "mamba",
    "t5",
    "bert",
    "falcon",
    "mixtral",
    "gemma2",
    "dinov2",
    "jamba",
    "clip",
    "swin",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_honest_edit_of_one_row_is_verified_in(name: str) -> None:
    module, inputs = make(name)
    model = Model(module)
    layer = model.get(f"{SPECS[name].layers[0]}.0")

    def edit() -> None:
        layer.hidden[0] *= 1.5

    report = model.verify(edit, **inputs)
    assert report, report
    assert {row.row for row in report.rows if row.verdict == "edited"} == {0}
    others = {row.verdict for row in report.rows if row.row}
    assert others <= {"bit-identical", "within rounding"}
