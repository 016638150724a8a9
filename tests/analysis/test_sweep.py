"""Every cell of a sweep is what a whole forward with plain hooks gives, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import SPECS, make
from tracekit import LanguageModel
from tracekit.analysis import (
    Patch,
    PatchSweep,
    logit_difference,
    patch_sweep,
)
from tracekit.analysis.patching import batches, runs
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.resuming import Kept, keep

pytestmark = pytest.mark.usefixtures("without_gradients")

LAYERS = {
    "gpt2": "transformer.h", "gptj": "transformer.h", "bloom": "transformer.h",
    "falcon": "transformer.h", "gpt_neo": "transformer.h", "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}  # fmt: skip
CUT = [
    *("gpt2", "gptj", "bloom", "falcon", "gpt_neo", "gpt_neox", "opt", "llama", "mistral"),
    *("qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere2", "mixtral"),
    *("qwen3_moe", "deepseek_v3", "gpt_oss"),
]
CLEAN = torch.arange(20, 30)
CORRUPTED = CLEAN.clone()
CORRUPTED[[2, 6]] = torch.tensor([50, 60])
CUT_SAYS = "the layers and positions that a patch can change"

See = Callable[[Tensor], None]


@cache
def model_of(name: str) -> tuple[Any, LanguageModel]:
    """A model that no test changes; its cuts are proved once."""
    net, _ = make(name)
    return net, LanguageModel(net)


def projected(logits: Tensor) -> Tensor:
    """A number that any difference of any logit changes."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1))
    return logits.float() @ weights


def forward(net: Any, ids: Tensor, hooks: dict[tuple[nn.Module, str], See]) -> Tensor:
    """The last logits of a bare forward, in which functions see what layers are given, or give."""
    handles: list[Any] = []
    for (module, slot), see in hooks.items():

        def before(_: Any, args: Any, kwargs: Any, see: See = see) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        def after(_: Any, __: Any, output: Any, see: See = see) -> None:
            see(output if isinstance(output, Tensor) else output[0])

        if slot == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after))
    logits = net(input_ids=ids[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


def naive(net: Any, base: Tensor, source: Tensor, module: nn.Module, slot: str) -> Tensor:
    """The projected logits with the other run's value at each position, one forward for each."""
    seen: list[Tensor] = []
    forward(net, source, {(module, slot): lambda value: seen.append(value.clone())})
    found: list[Tensor] = []
    for position in range(len(base)):

        def put(value: Tensor, position: int = position) -> None:
            value[:, position] = seen[0][:, position]

        found.append(projected(forward(net, base, {(module, slot): put})))
    return torch.stack(found)


def layers_of(name: str, net: Any) -> list[nn.Module]:
    return list(net.get_submodule(LAYERS.get(name, "model.layers")))


def swept(model: LanguageModel, *args: Any, **options: Any) -> PatchSweep:
    return patch_sweep(model, CLEAN, CORRUPTED, projected, *args, progress=False, **options)


# -- every cell, against hooks on the bare module --------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CUT if name in SPECS])
def test_every_cell_is_what_a_whole_forward_gives(name: str) -> None:
    net, model = model_of(name)
    found = swept(model, check=100)
    for number, layer in enumerate(layers_of(name, net)):
        expected = naive(net, CORRUPTED, CLEAN, layer, "input")
        torch.testing.assert_close(found.values.values[number], expected, atol=1e-4, rtol=0)
    assert found.how == CUT_SAYS
    assert found.deviation <= 1e-4 and found.checked == found.values.values.numel()


OF_HEADS = [("gpt2", each) for each in ("z", "k", "v", "q", "pattern", "attn_k")]
OF_HEADS += [("llama", "k"), ("llama", "pattern"), ("gemma2", "attn_k"), ("gemma2", "v")]


@pytest.mark.parametrize(("name", "activation"), OF_HEADS)
def test_every_head_and_position_is_what_whole_runs_give(name: str, activation: str) -> None:
    model = model_of(name)[1]
    chosen = [2, 3, 6, 9]
    over = ("layer", "position", "head")
    found = swept(model, over, activation=activation, positions=chosen)
    _, clean = model.run_with_cache(CLEAN[None], names_filter=activation)
    positions = 2 if activation == "pattern" else 1
    expected = torch.zeros_like(found.values.values)
    for layer, position, head in torch.ones_like(expected).nonzero().tolist():
        value = clean[activation, layer].movedim(positions, 1)

        def put(
            given: Tensor,
            _: Any,
            value: Tensor = value,
            at: Any = (slice(None), chosen[position], head),
        ) -> None:
            given.movedim(positions, 1)[at] = value[at]

        logits = model.run_with_hooks(CORRUPTED[None], fwd_hooks=[((activation, layer), put)])
        expected[layer, position, head] = projected(logits[0, -1])
    torch.testing.assert_close(found.values.values, expected, atol=1e-4, rtol=0)
    assert found.how == CUT_SAYS and found.unchanged < expected.numel()


@pytest.mark.parametrize("activation", ["resid_mid", "attn_out", "mlp_out", "mlp_post"])
def test_values_within_a_layer_come_to_the_end(activation: str) -> None:
    net, model = model_of("llama")
    found = swept(model, activation=activation, check=100)
    parts = {"attn_out": "self_attn", "mlp_out": "mlp"}
    assert found.how == CUT_SAYS and found.checked == 20
    for number, layer in enumerate(layers_of("llama", net)) if activation in parts else ():
        module = layer.get_submodule(parts[activation])
        expected = naive(net, CORRUPTED, CLEAN, module, "output")
        torch.testing.assert_close(found.values.values[number], expected, atol=1e-4, rtol=0)


def test_paths_of_modules_are_swept_like_names() -> None:
    net, model = model_of("gpt2")
    found = swept(model, ["transformer.h.1.mlp", "transformer.h.0", "transformer.wte"])
    for number, path in enumerate(found.values.labels("module")):
        expected = naive(net, CORRUPTED, CLEAN, net.get_submodule(path), "output")
        torch.testing.assert_close(found.values.values[number], expected, atol=1e-4, rtol=0)
    named = swept(model, activation="mlp_out", layers=[1])
    torch.testing.assert_close(found.at(module=0).values, named.values.values[0])
    embedded = ", 2 patches in whole forwards (what is in no layer is run in whole forwards)"
    assert found.how == CUT_SAYS + embedded


def test_noise_is_the_other_direction() -> None:
    net, model = model_of("llama")
    found = swept(model, direction="noise")
    expected = naive(net, CLEAN, CORRUPTED, layers_of("llama", net)[1], "input")
    torch.testing.assert_close(found.values.values[1], expected, atol=1e-4, rtol=0)
    assert found.base == found.clean != found.corrupted


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "falcon", "mixtral"])
def test_the_last_layer_may_be_computed_for_the_last_position_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches.Costs, "gains_by_narrowing", lambda *_: True)
    net, model = model_of(name)
    assert keep(model, CORRUPTED[None]).can_narrow
    found = swept(model, check=100)
    assert found.how == CUT_SAYS and found.deviation <= 1e-4
    for number, layer in enumerate(layers_of(name, net)):
        expected = naive(net, CORRUPTED, CLEAN, layer, "input")
        torch.testing.assert_close(found.values.values[number], expected, atol=1e-4, rtol=0)


# -- what is patched together ----------------------------------------------------------------------


def test_groups_are_patched_together() -> None:
    _, model = model_of("gpt2")
    groups = swept(model, layers=[0, (0, 1)], positions=[(2, 3), -1, (2, 6)], check=100)
    assert groups.values.shape == (2, 3) and groups.checked == 6
    assert groups.values.labels("layer") == ("0", "0+1")
    whole = groups.at(layer=0, position=2).item()  # all tokens that differ, in front of all layers
    assert whole == pytest.approx(groups.clean, abs=1e-5)
    window = swept(model, ("position",), activation="z", layers=[0, 1], check=100)
    each = swept(model, patches=[Patch("z", (0, 1), 6), Patch("z", 1, None, (0, 3))], check=100)
    assert each.values.values[0] == pytest.approx(float(window.values.values[6]), abs=1e-5)
    assert each.values.labels("patch") == ("z L0+1 P6", "z L1 H0+3")
    assert each.deviation < 1e-5 and window.checked == 10


def test_several_pairs_are_averaged_and_may_differ_in_length_without_positions() -> None:
    model = model_of("gpt2")[1]
    other = CLEAN.flip(0), CORRUPTED.flip(0)
    found = patch_sweep(
        model, [CLEAN, other[0]], [CORRUPTED, other[1]], projected, progress=False, check=9
    )
    alone = patch_sweep(model, *other, projected, progress=False)
    torch.testing.assert_close(found.per_pair.values[1], alone.values.values)
    torch.testing.assert_close(found.values.values, found.per_pair.values.mean(0))
    assert found.checked == 9
    pairs = [CLEAN, CLEAN[:7]], [CORRUPTED, CORRUPTED[:7]]
    heads = patch_sweep(model, *pairs, projected, ("layer", "head"), activation="z", progress=False)
    assert heads.per_pair.shape == (2, 2, 4)
    with pytest.raises(InputError, match="no positions in common"):
        patch_sweep(model, *pairs, projected, progress=False)


def test_a_metric_may_have_another_token_for_each_prompt() -> None:
    model = model_of("gpt2")[1]
    pairs = [CLEAN, CLEAN.flip(0)], [CORRUPTED, CORRUPTED.flip(0)]

    def metric(logits: Tensor) -> Tensor:
        return logits.gather(-1, torch.tensor([[3], [9]]))[:, 0]

    found = patch_sweep(model, *pairs, metric, layers=[1], progress=False)
    alone = patch_sweep(
        model, pairs[0][1], pairs[1][1], lambda x: x[:, 9], layers=[1], progress=False
    )
    torch.testing.assert_close(found.per_pair.values[1], alone.values.values)
    with pytest.raises(InputError, match=r"a number for each prompt, \[2\]"):
        patch_sweep(model, *pairs, lambda logits: logits.mean(), progress=False)


# -- what is not computed --------------------------------------------------------------------------


def test_only_what_a_patch_can_change_is_computed() -> None:
    net, _ = make("llama", num_hidden_layers=4)
    model = LanguageModel(net)
    source = CLEAN + 30
    found = patch_sweep(model, source, CLEAN, projected, progress=False, check=0, memory=1)
    cone = sum((4 - layer) * (10 - position) for layer in range(4) for position in range(10))
    prepared = 4 * 4 * 10  # two as they are, and two that are kept
    assert found.layer_tokens == cone + prepared
    assert found.naive_layer_tokens == 40 * 4 * 10
    assert found.saved == 1 - found.layer_tokens / found.naive_layer_tokens
    batched = patch_sweep(model, source, CLEAN, projected, progress=False, check=0)
    torch.testing.assert_close(batched.values.values, found.values.values, atol=1e-5, rtol=0)


def test_what_writes_the_bits_that_are_there_is_not_run() -> None:
    _, model = model_of("llama")
    found = swept(model)
    base = found.corrupted
    assert found.unchanged == 8 + 2  # all but two at the embeddings, what is before them later
    assert found.values.values[0, [0, 1, 3, 4, 5, 7, 8, 9]].tolist() == [base] * 8
    last = swept(model, activation="resid_post", layers=[1], check=10)
    assert last.unchanged == 9 and last.checked == 10  # the last position alone is read


@pytest.mark.parametrize("name", ["bert", "mamba", "rwkv", "granitemoehybrid", "albert"])
def test_where_positions_cannot_be_cut_more_is_computed_and_that_is_said(name: str) -> None:
    if name not in SPECS:
        pytest.skip("this version of transformers has no such family")
    found = swept(model_of(name)[1], check=100)
    says = "the layers that a patch can change, at all positions"
    says = {"rwkv": f"{says}, 2", "albert": "whole forwards"}.get(name, says)
    assert found.how.startswith(says) and found.how.endswith(")")
    assert found.checked == 20 and found.deviation < 1e-4
    assert found.how in repr(found)


def test_a_decoder_behind_an_encoder_is_run_whole() -> None:
    net, _ = make("t5")
    model = LanguageModel(net)
    given = {"input_ids": torch.arange(20, 26)[None], "decoder_input_ids": CLEAN[None]}
    other = {**given, "decoder_input_ids": CORRUPTED[None]}
    found = patch_sweep(model, given, other, projected, progress=False, check=100)
    assert found.how.startswith("whole forwards (T5ForConditionalGeneration has an encoder")
    assert found.checked == 20 and found.deviation < 1e-4
    with pytest.raises(InputError, match="decodes behind an encoder: give encodings"):
        patch_sweep(model, CLEAN, CORRUPTED, projected, progress=False)


# -- the check can fail ----------------------------------------------------------------------------


def test_a_wrong_cut_is_found_by_the_check_and_computed_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llama")[1]
    right = swept(model)
    others = model.prefill(CLEAN + 40)  # keys and values of another prompt
    own = runs.resume

    def wrong(model: LanguageModel, kept: Kept, *args: Any) -> Tensor:
        return own(model, Kept(kept.stream, others, ""), *args)

    monkeypatch.setattr(runs, "resume", wrong)
    found = swept(model, check=12)
    assert found.how.startswith("the layers that a patch can change, at all positions (less was")
    torch.testing.assert_close(found.values.values, right.values.values, atol=1e-5, rtol=0)
    unchecked = swept(model, check=0)
    assert not torch.allclose(unchecked.values.values, right.values.values, atol=1e-3)


def test_a_model_that_is_never_the_same_is_refused() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    noise = net.lm_head.register_forward_hook(lambda m, args, out: out + torch.randn_like(out))
    with pytest.raises(UnsupportedError, match="not what the module itself gives"):
        swept(model)
    noise.remove()
    net.train()
    with pytest.raises(InputError, match="training mode"):
        swept(model)


def test_lasting_edits_are_refused_and_hooks_of_torch_are_part_of_the_model() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    with model.edit() as edited:
        edited.layers[0].mlp_out *= 2
    with pytest.raises(UnsupportedError, match="does not make lasting edits"):
        swept(edited)
    net.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: out * 3)
    expected = naive(net, CORRUPTED, CLEAN, net.transformer.h[1], "input")
    found = swept(model, check=100)
    torch.testing.assert_close(found.values.values[1], expected, atol=1e-4, rtol=0)


def test_half_precision_is_held_to_its_own_rounding() -> None:
    net, _ = make("llama")
    found = swept(LanguageModel(net.to(torch.bfloat16)), check=100)
    assert found.how == CUT_SAYS and found.checked == 20 and found.deviation < 0.05


# -- interrupts ------------------------------------------------------------------------------------


def test_an_interrupt_hands_back_what_is_done_and_a_resume_does_the_rest() -> None:
    model = model_of("gpt2")[1]
    whole = swept(model)
    left = [8]

    def impatient(logits: Tensor) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return projected(logits)

    impatient.__name__ = "projected"
    part = patch_sweep(model, CLEAN, CORRUPTED, impatient, progress=False, memory=1)
    assert not part.is_complete and 0 < int(part.done.sum()) < part.done.numel()
    values, done = part.values.values, part.done[0]
    assert torch.equal(values.isnan(), ~done)
    torch.testing.assert_close(values[done], whole.values.values[done], atol=1e-5, rtol=0)
    assert "not complete" in repr(part) and json.dumps(part.to_json(), allow_nan=False)
    again = left[0]
    rest = patch_sweep(model, CLEAN, CORRUPTED, impatient, progress=False, resume=part)
    assert rest.is_complete and again - left[0] <= 3 + int((~done).sum())
    torch.testing.assert_close(rest.values.values, whole.values.values, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="resume= takes a sweep of the same prompts"):
        patch_sweep(model, CLEAN, CLEAN.flip(0), projected, progress=False, resume=part)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = model_of("gpt2")
    own, rows = runs.resume, list[int]()

    def small(model: LanguageModel, kept: Any, residual: Tensor, *args: Any) -> Tensor:
        rows.append(len(residual))
        if len(residual) > 2:
            raise torch.OutOfMemoryError
        return own(model, kept, residual, *args)

    whole = swept(model)
    monkeypatch.setattr(runs, "resume", small)
    found = swept(model)
    assert max(rows) > 2
    torch.testing.assert_close(found.values.values, whole.values.values, atol=1e-5, rtol=0)


# -- the answer ------------------------------------------------------------------------------------


def test_it_says_where_the_fact_is() -> None:
    model = LanguageModel("tracekit/tiny")
    metric = logit_difference(model, " Paris", " Rome")
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    found = patch_sweep(model, clean, corrupted, metric, progress=False, seed=0)
    assert found.values.labels("position")[4].strip() == "France"
    share = found.normalised().values
    assert share[0, 4] == pytest.approx(1, abs=1e-4) and share[-1, -1] == pytest.approx(1, abs=0.05)
    assert found.clean > 0 > found.corrupted
    text = repr(found)
    assert "4 layers x 6 positions" in text and "clean" in text
    assert {cell.place[1] for cell in found.top(4)} == {4, 5}
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown["values"]["axes"][0]["name"] == "layer" and shown["is_complete"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"over": ("layers", "position")}, "'layers' is no axis; there are layer, position, head"),
        ({"over": "layer"}, "over= is a tuple of axes"),
        ({"over": ("layer", "layer")}, "names one twice"),
        ({"over": ("layer", "head")}, "resid_pre has no heads"),
        ({"layers": [2]}, "layer=2: there are 0 to 1"),
        ({"positions": [10]}, "position=10: there are 0 to 9"),
        ({"direction": "up"}, "direction= is 'denoise'"),
        ({"activation": "final_norm_out"}, "of no layer"),
    ],
)
def test_what_cannot_be_swept_is_said(options: dict[str, Any], told: str) -> None:
    model = model_of("gpt2")[1]
    with pytest.raises(InputError, match=told):
        patch_sweep(model, CLEAN, CORRUPTED, projected, progress=False, **options)


def test_prompts_of_other_lengths_are_refused() -> None:
    model = model_of("gpt2")[1]
    with pytest.raises(InputError, match="must be of one length"):
        patch_sweep(model, CLEAN, CLEAN[:4], projected, progress=False)
    with pytest.raises(InputError, match="are no pairs"):
        patch_sweep(model, [CLEAN, CLEAN], CLEAN, projected, progress=False)
