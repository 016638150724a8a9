"""A model whose weights are on the disk, or brought from the CPU, is the model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor

from tests.models.away import WAYS, empty_memory_is_nan, put_away, whereabouts
from tests.tiny_models import SPECS, generate, make
from tracekit import LanguageModel
from tracekit.analysis import (
    attribution_patching,
    copying_scores,
    direct_logit_attribution,
    edge_attribution,
    head_scores,
    integrated_gradients,
    logit_difference,
    logit_lens,
    patch_sweep,
)
from tracekit.errors import MissingNameError

# Tied weights: gpt2, t5, gemma2; a mixture of experts; encoder and decoder; a state space model.
FAMILIES = ["gpt2", "llama", "mixtral", "t5", "mamba", "gemma2"]
DECODERS = ["gpt2", "llama", "mixtral", "gemma2"]
WEIGHTS = [
    "W_E",
    "W_pos",
    "W_U",
    "W_Q",
    "W_K",
    "W_V",
    "W_O",
    "W_in",
    "W_gate",
    "W_out",
    "b_Q",
    "b_O",
]
IDS = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]])
ONE, OTHER = IDS[:1], torch.tensor([[11, 12, 50, 14, 15, 16]])


@dataclass
class Pair:
    """The same weights twice: in memory, and elsewhere."""

    name: str
    memory: LanguageModel
    away: LanguageModel
    inputs: dict[str, Any]

    @property
    def both(self) -> tuple[LanguageModel, LanguageModel]:
        return self.memory, self.away


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Pair]:
    found: dict[tuple[str, str], Pair] = {}
    for name in FAMILIES:
        memory, inputs = make(name)
        for way in WAYS:
            folder = tmp_path_factory.mktemp("weights")
            net = put_away(make(name)[0], way, folder, tuple(SPECS[name].layers))
            net(**inputs)  # accelerate parts tied weights in the first call
            generate(name, net, inputs)  # transformers leaves an attribute on T5
            found[name, way] = Pair(name, LanguageModel(memory), LanguageModel(net), inputs)
    return found


@pytest.fixture(params=[(name, way) for name in FAMILIES for way in WAYS], ids="-".join)
def pair(request: pytest.FixtureRequest, pairs: dict[tuple[str, str], Pair]) -> Iterator[Pair]:
    yield from _untouched(pairs[request.param])


@pytest.fixture(params=[(name, way) for name in DECODERS for way in WAYS], ids="-".join)
def decoder(request: pytest.FixtureRequest, pairs: dict[tuple[str, str], Pair]) -> Iterator[Pair]:
    yield from _untouched(pairs[request.param])


def _untouched(pair: Pair) -> Iterator[Pair]:
    before = whereabouts(pair.away.module)
    with empty_memory_is_nan():
        yield pair
    assert whereabouts(pair.away.module) == before


def same(found: Any, expected: Any) -> None:
    """Equal in every bit, down to what is in them."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), (found - expected).abs().max()
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


def numbers(found: Any) -> Tensor:
    """The values of an answer."""
    return found if isinstance(found, Tensor) else numbers(found.values)


def test_reads_caches_and_edits(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        layer = model.layers[0]
        with model.trace(**pair.inputs) as tracer:
            cache = tracer.cache()
            layer.hidden[:] = layer.hidden * 1.5
            last = model.layers[-1].hidden
            logits = tracer.result.logits
        recorded = {path: cache[path][0].output for path in cache}
        tensors = {path: each for path, each in recorded.items() if isinstance(each, Tensor)}
        found.append((last, logits, tensors))
    same(found[1], found[0])
    assert len(found[0][2]) > 10


def test_a_value_of_one_run_is_patched_into_another(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        with model.trace(**pair.inputs):
            clean = model.layers[0].hidden
        with model.trace(**pair.inputs) as tracer:
            model.layers[-1].hidden[1:] = clean[:1]
            logits = tracer.result.logits
        found.append((clean, logits))
    same(found[1], found[0])


def test_blocks_share_one_forward(pairs: dict[tuple[str, str], Pair]) -> None:
    pair, found = pairs["llama", "mixed"], list[Any]()
    for model in pair.both:
        with model.trace() as tracer:
            with tracer.invoke(ONE):
                clean = model.layers[0].hidden
            with tracer.invoke(OTHER):
                model.layers[0].hidden[:] = clean
                logits = model.lm_head.output
        found.append((clean, logits))
    same(found[1], found[0])


def test_everything_by_name_up_to_a_layer_and_from_one_on(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        _, cache = model.run_with_cache(**pair.inputs)
        resid, part = model.run_with_cache(**pair.inputs, stop_at_layer=1)
        others = {k: v for k, v in pair.inputs.items() if not k.endswith("input_ids")}
        rest: Any = None
        if pair.name != "t5":  # whose first layer hands a bias on
            rest = model.forward(cache["resid_pre", 1], start_at_layer=1, **others)
        read = {str(key): cache[key] for key in cache}
        found.append((read, resid, {str(key): part[key] for key in part}, rest))
    same(found[1], found[0])


def test_functions_at_activations(pair: Pair) -> None:
    hooks = [(("resid_post", 0), lambda value, _: value * 2)]
    found = [model.run_with_hooks(**pair.inputs, fwd_hooks=hooks) for model in pair.both]
    same(found[1], found[0])


def test_a_generation_and_its_steps(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        given = {**SPECS[pair.name].gen_inputs(pair.inputs), "do_sample": False}
        with model.generate(**given, max_new_tokens=3) as tracer:
            cache = tracer.cache(modules=[model.layers[-1]])
            tokens = tracer.result
        assert cache.verify()
        found.append((tokens, [each.hidden for each in cache[model.layers[-1].path]]))
    same(found[1][0], found[0][0])
    for one, other in zip(found[1][1], found[0][1], strict=True):
        # A kernel may add up in another order where memory is aligned otherwise (experts do).
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-5)


def test_a_prefix_is_used_twice_and_goes_from_one_to_the_other_by_file(
    decoder: Pair, tmp_path: Path
) -> None:
    found: list[Any] = []
    for number, model in enumerate(decoder.both):
        prefix = model.prefill(ONE[:, :4])
        prefix.save(tmp_path / str(number))
        for _ in range(2):  # each call leaves other tensors in the place of the weights
            with model.trace(ONE[:, 4:], prefix=prefix) as tracer:
                logits = tracer.result.logits
        found.append(logits)
    same(found[1], found[0])
    for number, model in enumerate(reversed(decoder.both)):
        with model.trace(ONE[:, 4:], prefix=model.load_prefix(tmp_path / str(number))) as tracer:
            logits = tracer.result.logits
        same(logits, found[0])


def test_a_dry_run_goes_on_without_weights(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        with model.scan(**pair.inputs):
            layer = model.layers[-1].hidden
        found.append((layer.shape, layer.dtype, str(layer.device)))
    assert found[0] == found[1]


def test_a_verified_run_reports_the_same(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        with model.trace(**pair.inputs, verify=True) as tracer:
            model.layers[0].hidden[:] = 0
        found.append((str(tracer.report), [each.slug for each in tracer.report.problems]))
    assert found[0] == found[1]


def test_gradients_with_respect_to_activations(pair: Pair) -> None:
    found: list[Any] = []
    for model in pair.both:
        with model.trace(**pair.inputs):
            hidden = model.layers[0].hidden
            with model.layers[-1].hidden.square().sum().backward():
                gradient = hidden.grad
        found.append(gradient)
    same(found[1], found[0])
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("which", [("gpt2", "disk"), ("llama", "mixed")], ids="-".join)
def test_the_standard_names_are_proved(
    pairs: dict[tuple[str, str], Pair], which: tuple[str, str]
) -> None:
    pair = pairs[which]
    found = [model.check_names(**pair.inputs) for model in pair.both]
    assert found[0] and found[1], str(found[1])
    assert str(found[1]) == str(found[0])


def test_weights_by_standard_name(decoder: Pair) -> None:
    there = [name for name in WEIGHTS if hasattr(decoder.memory, name)]
    assert len(there) > 4
    for name in WEIGHTS:
        if name in there:
            same(getattr(decoder.away, name), getattr(decoder.memory, name))
        else:
            with pytest.raises(MissingNameError):
                getattr(decoder.away, name)


def test_what_is_made_of_weights(decoder: Pair) -> None:
    found = [
        (model.composition_scores("K").values, model.accumulated_bias(1), model.layers[0].OV.A)
        for model in decoder.both
    ]
    same(found[1], found[0])


def test_a_sweep_of_patches(decoder: Pair) -> None:
    found = [
        patch_sweep(model, ONE, OTHER, logit_difference(model, 5, 7), progress=False)
        for model in decoder.both
    ]
    torch.testing.assert_close(numbers(found[1]), numbers(found[0]), atol=1e-6, rtol=1e-5)
    assert numbers(found[0]).abs().sum() > 0
    assert found[1].how == found[0].how  # from layers and positions on, not in whole forwards


def test_tools_that_read_weights(decoder: Pair) -> None:
    found: list[Any] = []
    for model in decoder.both:
        metric = logit_difference(model, 5, 7)
        lens = logit_lens(model, ONE)
        found.append(
            {
                "components": numbers(direct_logit_attribution(model, IDS, 5, 7)),
                "heads": numbers(direct_logit_attribution(model, IDS, 5, 7, by="head")),
                "copying": numbers(copying_scores(model)),
                "induction": numbers(head_scores(model, length=6, rows=2).induction),
                "lens": [each for each in vars(lens).values() if isinstance(each, Tensor)],
                "first order": numbers(attribution_patching(model, ONE, OTHER, metric)),
                "integrated": numbers(integrated_gradients(model, ONE, metric, steps=3).scores),
                "edges": numbers(edge_attribution(model, ONE, OTHER, metric).scores).nan_to_num(),
            }
        )
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_a_trace_brings_each_weight_as_often_as_a_bare_forward(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[Any] = []
    own = AlignDevicesHook.pre_forward

    def counted(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        brought.append(module)
        return own(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted)
    pair.away.module(**pair.inputs)
    bare, brought[:] = brought[:], []
    with pair.away.trace(**pair.inputs) as tracer:
        tracer.cache()
        pair.away.layers[0].hidden[:] = 0
    assert brought == bare
    brought.clear()
    layer = pair.away.layers[0].mlp if hasattr(pair.away.layers[0], "mlp") else pair.away.layers[0]
    with pair.away.trace(**pair.inputs):
        layer.skip(layer.input)
    assert len(brought) < len(bare)  # what is skipped is not brought


# -- a whole model, loaded with less memory than it needs -----------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        {"device_map": "auto", "max_memory": {"cpu": "3MB"}},
        {"device_map": {"": "disk"}},
        {"device_map": {"": "disk"}, "dispatch": False},
    ],
    ids=["3 MB", "disk", "disk, late"],
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("weights")
    return LanguageModel("tracekit/tiny", offload_folder=str(folder), **request.param)


CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"


def test_a_model_that_does_not_fit_is_traced_and_patched(tiny: LanguageModel) -> None:
    found: list[Any] = []
    for model in (LanguageModel("tracekit/tiny"), tiny):
        with model.trace(CLEAN):
            clean = model.transformer.h[2].output
            head = model.lm_head(model.transformer.ln_f(clean))
        with model.trace(CORRUPTED):
            model.transformer.h[2].output[:, -1] = clean[:, -1]
            logits = model.lm_head.output
        found.append((clean, head, logits))
    same(found[1], found[0])
    assert sum(weight.numel() for weight in tiny.module.parameters() if weight.is_meta) > 300_000
    assert str(tiny.device) == "cpu"


def test_a_model_that_does_not_fit_is_cached_and_generates(tiny: LanguageModel) -> None:
    found: list[Any] = []
    for model in (LanguageModel("tracekit/tiny"), tiny):
        logits, cache = model.run_with_cache(CLEAN, stop_at_layer=3, names_filter="resid_pre")
        tokens = model.generate(CLEAN, max_new_tokens=4, do_sample=False)
        text = model.generate(CLEAN, max_new_tokens=4, do_sample=False, return_type="str")
        found.append((logits, [cache[key] for key in cache], tokens, text))
    same(found[1], found[0])
