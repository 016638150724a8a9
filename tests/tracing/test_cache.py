"""What a cache records, how it is asked for, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, is_same, plain_hooks, small
from tracekit import Cache, Entries, Entry, Model, Note
from tracekit.errors import CacheError, NeverRanError, UnknownModuleError, UnknownPathError


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def gpt2(**config: Any) -> tuple[Model, dict[str, Any]]:
    model, inputs = make("gpt2", **config)
    return Model(model), inputs


BLOCKS = ["model.transformer.h.0", "model.transformer.h.1"]
MLPS = [f"{block}.mlp" for block in BLOCKS]


# -- which modules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "paths"),
    [
        (lambda m: m.transformer.h[0], BLOCKS[:1]),
        (lambda m: [m.transformer.h[1], m.transformer.h[0]], BLOCKS),
        (lambda m: "model.transformer.h.0", BLOCKS[:1]),
        (lambda m: "transformer.h.0", BLOCKS[:1]),
        (lambda m: "transformer.h.*.mlp", MLPS),
        (lambda m: "model.transformer.h.[0-1]", BLOCKS),
        (lambda m: lambda path, module: path.endswith(".mlp"), MLPS),
        (lambda m: lambda _, module: isinstance(module, nn.LayerNorm), None),
        (lambda m: m.transformer.h, BLOCKS),
        (lambda m: "transformer.h", BLOCKS),
        (lambda m: m.transformer.h[:1], BLOCKS[:1]),
        (lambda m: [m.transformer.h[0], "transformer.h.1", "transformer.h.0"], BLOCKS),
        (lambda m: (block.mlp for block in m.transformer.h), MLPS),
    ],
    ids=[
        *("envoy", "list", "full path", "path", "glob", "glob of a full path"),
        *("predicate of paths", "predicate of modules", "container", "path of a container"),
        *("slice", "mixed", "generator"),
    ],
)
def test_modules_are_named_in_every_way(choose: Any, paths: list[str] | None) -> None:
    model, inputs = gpt2()
    with model.trace(**inputs) as tracer:
        cache = tracer.cache(modules=choose(model))
    if paths is None:
        norms = [n for n, m in model.module.named_modules() if isinstance(m, nn.LayerNorm)]
        paths = [f"model.{norm}" for norm in norms]
    assert list(cache) == paths


@pytest.mark.parametrize("path", ["transformer.h.0.mpl", "model.transformer.hh.0"])
def test_an_unknown_path_is_refused_with_near_ones(path: str) -> None:
    model, inputs = gpt2()
    with pytest.raises(UnknownPathError, match="did you mean"):
        with model.trace(**inputs) as tracer:
            tracer.cache(modules=[path])


@pytest.mark.parametrize("nothing", ["transformer.g.*", lambda path, module: False, []])
def test_a_choice_of_nothing_is_refused(nothing: Any) -> None:
    model, inputs = gpt2()
    with pytest.raises((UnknownPathError, CacheError), match=r"match|names no module"):
        with model.trace(**inputs) as tracer:
            tracer.cache(modules=nothing)


def test_a_module_of_another_model_is_refused() -> None:
    model, inputs = gpt2()
    other, _ = gpt2()
    with pytest.raises(UnknownPathError, match="another model"):
        with model.trace(**inputs) as tracer:
            tracer.cache(modules=[other.transformer.h[0]])


def test_a_named_module_that_never_runs_is_an_error() -> None:
    model, inputs = make("mamba")
    conv = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv1d))
    traced = Model(model)
    with pytest.raises(NeverRanError, match="conv1d"):
        with traced.trace(**inputs) as tracer:
            tracer.cache(modules=[conv])


def test_a_module_that_never_runs_is_left_out_if_it_was_not_named() -> None:
    model, inputs = make("mamba")
    traced = Model(model)
    with traced.trace(**inputs) as tracer:
        cache = tracer.cache()
    assert not any(path.endswith("conv1d") for path in cache)


# -- how values are kept -----------------------------------------------------------------------


class Mixed(nn.Module):
    """Returns numbers of every kind."""

    def forward(self, value: Tensor) -> dict[str, Any]:
        return {
            "real": value,
            "whole": torch.arange(3),
            "truth": value > 0,
            "complex": torch.complex(value, value),
        }


def test_dtype_casts_real_numbers_and_leaves_integers_truths_and_imaginary_parts() -> None:
    model = Model(nn.Sequential(Mixed()))
    with model.trace(X) as tracer:
        cache = tracer.cache(dtype=torch.float16)
    kept = cache["model.0"].output
    assert torch.equal(kept["real"], X.half())
    assert kept["whole"].dtype == torch.int64
    assert kept["truth"].dtype == torch.bool
    assert kept["complex"].is_complex()
    assert torch.allclose(kept["complex"].imag.float(), X, atol=1e-3)


def test_values_are_detached_unless_gradients_are_asked_for() -> None:
    model = Model(small())
    with torch.enable_grad():
        with model.trace(X) as tracer:
            cut = tracer.cache()
            joined = tracer.cache(detach=False)
        assert not cut["model.0"].output.requires_grad
        output = joined["model.0"].output
        (gradient,) = torch.autograd.grad(joined["model"].output.sum(), output)
        own = model.module[0](X)
        (expected,) = torch.autograd.grad(model.module[2](model.module[1](own)).sum(), own)
    assert torch.equal(gradient, expected)


def test_values_that_keep_their_graph_stay_in_it_beside_a_block_that_reads_them() -> None:
    model, inputs = gpt2()
    with torch.enable_grad():
        with model.trace(**inputs) as tracer:
            cache = tracer.cache(detach=False)
            model.transformer.h[0].mlp.output.mean()
            loss = tracer.result.logits.sum()
        output = cache["model.transformer.h.0.mlp.c_proj"].output
        (gradient,) = torch.autograd.grad(loss, output)
    assert gradient.shape == output.shape


def test_a_cache_moves_values_as_they_are_recorded_and_never_the_model() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        moved = tracer.cache(device="meta")
        left = tracer.cache(device=None)
    assert moved["model.0"].output.is_meta
    assert moved["model.0"].output.shape == (3, 4)
    assert torch.equal(left["model.0"].output, model.module[0](X))
    assert {p.device.type for p in model.module.parameters()} == {"cpu"}


def test_several_caches_of_one_trace_do_not_know_each_other() -> None:
    model, inputs = gpt2()
    with plain_hooks(model.module) as seen:
        model.module(**inputs)
    with model.trace(**inputs) as tracer:
        blocks = tracer.cache(modules=model.transformer.h)
        halves = tracer.cache(modules="transformer.h.*.mlp", dtype=torch.float16)
        inputs_only = tracer.cache(modules="lm_head", include_inputs=True, include_output=False)
    assert list(blocks) == BLOCKS and list(halves) == MLPS
    assert is_same(blocks[BLOCKS[1]].output, seen[BLOCKS[1]][0])
    assert torch.equal(halves[MLPS[0]].output, seen[MLPS[0]][0].half())
    assert is_same(inputs_only["model.lm_head"].input, seen["model.transformer.ln_f"][0])
    with pytest.raises(CacheError, match="include_output=True"):
        inputs_only["model.lm_head"].output


def test_a_live_kv_cache_among_the_inputs_is_noted_with_its_length() -> None:
    model, inputs = make("llama")
    with Model(model).generate(**inputs, max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache(modules="model.layers.0", include_inputs=True)
    notes = [entry.inputs[1]["past_key_values"] for entry in cache["model.model.layers.0"]]
    prompt = inputs["input_ids"].shape[1]
    assert notes == [Note("DynamicCache", length) for length in (0, prompt, prompt + 1)]


def test_a_cache_sees_what_an_edit_made() -> None:
    model, inputs = gpt2()
    with model.trace(**inputs) as tracer:
        cache = tracer.cache()
        model.transformer.h[0].output[:] = 0
        model.transformer.h[1].mlp.output = torch.ones_like(model.transformer.h[1].mlp.output)
        model.lm_head.input = model.lm_head.input * 2
        logits = tracer.result.logits
    assert not cache[BLOCKS[0]].output.any()
    assert (cache[MLPS[1]].output == 1).all()
    assert torch.equal(cache["model.lm_head"].output, logits)


@pytest.mark.parametrize("runs", [1, 2])
def test_an_edit_leaves_earlier_records_of_the_same_memory_alone(runs: int) -> None:
    model, inputs = gpt2()  # in eval mode c_proj, the dropout and the mlp return one memory
    with plain_hooks(model.module) as seen:
        model.module(**inputs)
    for _ in range(runs):
        with model.trace(**inputs) as tracer:
            cache = tracer.cache(include_inputs=True)
            model.transformer.h[0].mlp.output[:] = 0
    for name in ("c_proj", "dropout"):
        path = f"{MLPS[0]}.{name}"
        assert is_same(cache[path].output, seen[path][0])
    assert is_same(cache[f"{MLPS[0]}.dropout"].input, seen[f"{MLPS[0]}.c_proj"][0])
    assert not cache[MLPS[0]].output.any()


def test_an_edit_of_an_input_leaves_the_record_of_the_output_before_it_alone() -> None:
    net = small()
    model = Model(net)
    for _ in range(2):
        with model.trace(X) as tracer:
            cache = tracer.cache(include_inputs=True)
            model[1].input[:] = 0
    assert torch.equal(cache["model.0"].output, net[0](X))
    assert not cache["model.1"].input.any()


def test_an_edit_of_the_result_leaves_the_records_alone() -> None:
    net = small()
    model = Model(net)
    for _ in range(2):
        with model.trace(X) as tracer:
            cache = tracer.cache()
            tracer.result.zero_()
    assert torch.equal(cache["model"].output, net(X))


# -- when --------------------------------------------------------------------------------------


def test_a_cache_made_late_records_what_is_still_to_come() -> None:
    model = Model(nn.Sequential(small(), nn.Linear(4, 4)))
    with model.trace(X) as tracer:
        model[0][1].output
        cache = tracer.cache(modules=[model[0], model[1]])
    assert list(cache) == ["model.0", "model.1"]
    assert torch.equal(cache["model.0"].output, model.module[0](X))


@pytest.mark.parametrize("late", ["0.0", "0.0.0", "0"])
def test_a_cache_of_a_module_that_has_passed_is_refused(late: str) -> None:
    inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    model = Model(nn.Sequential(inner, nn.Linear(4, 4)))
    with pytest.raises(CacheError, match=f"had passed model.{late}"):
        with model.trace(X) as tracer:
            model[1].input
            tracer.cache(modules=[late])


def test_a_cache_of_inputs_of_a_module_that_has_begun_is_refused() -> None:
    model = Model(nn.Sequential(small(), nn.Linear(4, 4)))
    with pytest.raises(CacheError, match="had passed"):
        with model.trace(X) as tracer:
            model[0][1].output
            tracer.cache(modules=[model[0]], include_inputs=True)


def test_a_stop_keeps_what_ran_and_the_site_stopped_at() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[1].output
        tracer.stop()
    assert list(cache) == ["model.0", "model.1"]
    assert torch.equal(cache["model.1"].output, net[1](net[0](X)))
    with pytest.raises(UnknownPathError, match="ended before"):
        cache["model.2"]


def test_an_error_in_the_block_keeps_what_ran() -> None:
    net = small()
    model = Model(net)
    with pytest.raises(ZeroDivisionError):
        with model.trace(X) as tracer:
            cache = tracer.cache()
            model[1].output
            1 / 0
    assert torch.equal(cache["model.0"].output, net[0](X))


@pytest.mark.parametrize(
    "ask", [len, list, repr, lambda c: c["model.0"], lambda c: c.model, lambda c: "model.0" in c]
)
def test_a_cache_that_is_still_recording_never_looks_empty(ask: Any) -> None:
    model = Model(small())
    said: list[str] = []
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[2].output
        try:
            said.append(str(ask(cache)))
        except CacheError as error:
            said.append(str(error))
    assert "trace" in said[0]


def test_a_cache_outside_its_block_is_refused() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        pass
    with pytest.raises(CacheError, match="block"):
        tracer.cache()


def test_a_cache_of_nothing_is_refused() -> None:
    model = Model(small())
    with pytest.raises(CacheError, match="record nothing"):
        with model.trace(X) as tracer:
            tracer.cache(include_output=False)


# -- asking it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> tuple[Cache, dict[str, list[Any]]]:
    model, inputs = gpt2(n_layer=4)
    with torch.no_grad(), plain_hooks(model.module) as seen:
        model.module(**inputs)
    with torch.no_grad(), model.trace(**inputs) as tracer:
        cache = tracer.cache(include_inputs=True)
    return cache, seen


@pytest.fixture(scope="module")
def steps() -> Cache:
    model, inputs = gpt2()
    with model.generate(**inputs, max_new_tokens=4, do_sample=False) as tracer:
        cache = tracer.cache(modules=model.transformer.h)
    return cache


def test_a_cache_is_a_mapping(made: tuple[Cache, Any]) -> None:
    cache, seen = made
    assert set(cache.keys()) == set(seen)
    assert len(cache) == len(list(cache)) == len(seen)
    assert BLOCKS[0] in cache and "model.nothing" not in cache
    assert all(type(entries) is Entries for entries in cache.values())
    assert dict(cache.items()).keys() == cache.keys()
    assert cache.get("model.nothing") is None


def test_attributes_lead_to_the_same_data(made: tuple[Cache, Any]) -> None:
    cache, _ = made
    by_key = cache[MLPS[1]].output
    assert cache.model.transformer.h[1].mlp.output is by_key
    assert cache.model.transformer.h[1].mlp[0].output is by_key
    assert cache.model.transformer.h[-1].mlp.output is cache["model.transformer.h.3.mlp"].output
    assert len(cache.model.transformer.h) == 4
    assert "transformer" in dir(cache.model)


def test_a_list_of_recorded_modules_is_iterated_whatever_its_first_index() -> None:
    model, inputs = gpt2(n_layer=4)
    with model.trace(**inputs) as tracer:
        cache = tracer.cache(modules=model.transformer.h[2:])
    blocks = list(cache.model.transformer.h)
    assert len(blocks) == 2
    assert all(
        block.output is cache[path].output for block, path in zip(blocks, cache, strict=True)
    )


def test_a_negative_index_means_the_same_children_as_a_positive_one() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache()
    assert cache.model[-1].output is cache.model[2].output
    assert cache.model[-2].output is cache.model[1].output


def test_a_wrong_key_or_attribute_suggests_near_ones(made: tuple[Cache, Any]) -> None:
    cache, _ = made
    with pytest.raises(UnknownPathError, match=r"did you mean 'model\.transformer\.h\.0"):
        cache["model.transformer.h.0.mlpp"]
    with pytest.raises(UnknownModuleError, match="did you mean 'transformer'"):
        cache.model.transfomer
    assert not hasattr(cache, "modle")


def test_entries_of_one_visit_reach_through_to_it(made: tuple[Cache, Any]) -> None:
    entries = made[0][BLOCKS[0]]
    assert len(entries) == 1
    assert entries.output is entries[0].output is entries.hidden
    assert entries.input is entries[0].inputs[0][0]
    assert entries.outputs == [entries.output]
    assert (entries[0].step, entries[0].call, entries[0].path) == (0, 0, BLOCKS[0])


@pytest.mark.parametrize("name", ["output", "hidden", "input", "inputs"])
def test_entries_of_several_visits_have_no_single_value(steps: Cache, name: str) -> None:
    with pytest.raises(CacheError, match=r"4 entries.*\[0\].*outputs"):
        getattr(steps[BLOCKS[0]], name)


def test_entries_are_a_sequence(steps: Cache) -> None:
    entries = steps[BLOCKS[0]]
    assert [entry.step for entry in entries] == [0, 1, 2, 3]
    assert [tuple(output.shape)[1] for output in entries.outputs] == [8, 1, 1, 1]
    assert isinstance(entries[-1], Entry) and entries[-1].step == 3
    assert [entry.step for entry in entries[1:3]] == [1, 2]
    assert [entry.step for entry in entries.at(2)] == [2]
    assert entries.at(9).outputs == []
    with pytest.raises(IndexError, match="4 entries"):
        entries[4]


def test_a_module_that_runs_several_times_has_an_entry_for_each_call() -> None:
    model, inputs = make("albert")
    with plain_hooks(model) as seen:
        model(**inputs)
    path = next(path for path, values in seen.items() if len(values) > 1)
    with Model(model).trace(**inputs) as tracer:
        cache = tracer.cache()
    assert [entry.call for entry in cache[path]] == list(range(len(seen[path])))
    assert all(is_same(e.output, v) for e, v in zip(cache[path], seen[path], strict=True))


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_cache_travels_without_the_model(way: str, made: tuple[Cache, Any]) -> None:
    cache, _ = made
    if way == "deepcopy":
        other = copy.deepcopy(cache)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    else:
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        assert b"GPT2LMHeadModel" not in buffer.getvalue()
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert list(other) == list(cache)
    assert all(
        torch.equal(other[path].hidden, cache[path].hidden) for path in cache if path != "model"
    )
    assert torch.equal(other["model"].output.logits, cache["model"].output.logits)
    assert other.model.transformer.h[0].output is other[BLOCKS[0]].output


def test_a_cache_is_readable(made: tuple[Cache, Any], steps: Cache) -> None:
    text, page = repr(made[0]), made[0]._repr_html_()
    assert f"{len(made[0])} modules" in text and "Tensor[2, 8, 32] float32 cpu" in text
    assert page.count("<tr>") == len(made[0]) + 1
    assert "4 entries" in repr(steps)
    assert "step=0" in repr(steps[BLOCKS[0]])
