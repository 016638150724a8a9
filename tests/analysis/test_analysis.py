"""What the residual stream is taken apart into adds up to it, and to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import NAMES, make
from tracekit import LanguageModel
from tracekit.analysis import (
    accumulated_resid,
    apply_norm_to_stack,
    decompose_resid,
    full_resid_decomposition,
    get_neuron_results,
    logit_attrs,
    stack_head_results,
    stack_neuron_results,
)
from tracekit.architectures import known_families
from tracekit.errors import CacheError, InputError, UnsupportedError

pytestmark = pytest.mark.usefixtures("without_gradients")
WANTED = {
    *("gpt2", "gptj", "llama", "qwen2", "gemma2", "granite", "mixtral", "mamba", "jamba", "bamba"),
    *("opt", "bloom", "falcon", "gpt_neox", "olmo2", "cohere2", "phi3", "deepseek_v3", "gpt_oss"),
    *("lfm2", "glm4", "granitemoehybrid", "falcon_h1", "zamba2", "qwen3_next", "llama4_text"),
}
ADDING = sorted(WANTED & set(NAMES) & set(known_families()))


def run(name: str, **config: Any) -> tuple[LanguageModel, Any, Tensor]:
    """A model whose gains and biases are no ones and zeros, and a cache of a run."""
    net, inputs = make(name, **config)
    torch.manual_seed(1)
    for weight in net.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight) / 2)
        else:
            weight.mul_(3)
    model = LanguageModel(net)
    _, cache = model.run_with_cache(**inputs)
    return model, cache, inputs["input_ids"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ADDING)
def test_what_is_added_adds_up_to_the_stream(name: str) -> None:
    model, cache, _ = run(name)
    whole = decompose_resid(model, cache)
    close(whole.values.sum(0), cache["resid_final"])
    first = decompose_resid(model, cache, layer=1)
    close(first.values.sum(0), cache["resid_pre", 1])
    full = full_resid_decomposition(model, cache)
    close(full.values.sum(0), cache["resid_final"])
    if ("resid_mid", 1) in cache:
        mid = cache["resid_mid", 1].view_as(cache["resid_pre", 1])
        close(decompose_resid(model, cache, 1, mlp_input=True).values.sum(0), mid)
        middle = full_resid_decomposition(model, cache, 1, mlp_input=True, pos_slice=-1)
        close(middle.values.sum(0), mid[:, -1])


@pytest.mark.parametrize("name", ADDING)
def test_parts_through_the_final_norm_add_up_to_what_it_gave(name: str) -> None:
    model, cache, _ = run(name)
    normed = full_resid_decomposition(model, cache, apply_norm=True)
    bias = getattr(model.final_norm.module, "bias", None)
    close(normed.values.sum(0) + (0 if bias is None else bias), cache["final_norm_out"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_attributions_add_up_to_the_logits(name: str) -> None:
    model, cache, ids = run(name)
    model = model.processed()
    _, cache = model.run_with_cache(ids)
    parts = full_resid_decomposition(model, cache, expand_neurons=False)
    b_U = model.module.lm_head.bias
    for token in (7, ids, ids[:, 0]):
        index = torch.as_tensor(token)
        index = index[:, None] if index.ndim == 1 else index
        logits = cache["logits"] if b_U is None else cache["logits"] - b_U
        expected = logits.gather(-1, index.expand(ids.shape).unsqueeze(-1)).squeeze(-1)
        close(logit_attrs(model, cache, parts, token).sum(0), expected)
    difference = logit_attrs(model, cache, parts, 7, 9)
    close(difference, logit_attrs(model, cache, parts, 7) - logit_attrs(model, cache, parts, 9))
    with pytest.raises(InputError, match="one for each row"):
        logit_attrs(model, cache, parts, torch.tensor([1, 2, 3]))


def test_the_unprocessed_model_is_attributed_with_the_gain_of_its_final_norm() -> None:
    model, cache, _ = run("llama")
    parts = decompose_resid(model, cache)
    close(logit_attrs(model, cache, parts, 7).sum(0), cache["logits"][..., 7])


def test_the_stream_accumulates_layer_by_layer() -> None:
    model, cache, _ = run("gpt2")
    values, labels = accumulated_resid(model, cache, incl_mid=True)
    assert labels == ("0_pre", "0_mid", "1_pre", "1_mid", "final_post")
    assert torch.equal(values[3], cache["resid_mid", 1])
    assert torch.equal(values[4], cache["resid_post", 1])
    assert accumulated_resid(model, cache, layer=1).labels == ("0_pre", "1_pre")
    assert accumulated_resid(model, cache, 1, mlp_input=True).labels == ("0_pre", "1_pre", "1_mid")
    at = accumulated_resid(model, cache, pos_slice=-1).values
    assert torch.equal(at[-1], cache["resid_post", 1][:, -1])


def test_the_logit_lens_of_the_last_layer_is_the_logits() -> None:
    model, cache, _ = run("gpt2")
    lens = model.unembed(accumulated_resid(model, cache, apply_norm=True).values)
    assert torch.equal(lens[-1], cache["logits"])
    expected = model.module.lm_head(model.module.transformer.ln_f(cache["resid_pre", 1]))
    assert torch.equal(lens[1], expected)


def test_labels_say_what_each_part_is() -> None:
    model, cache, _ = run("gpt2")
    assert decompose_resid(model, cache).labels == (
        *("embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"),
    )
    assert decompose_resid(model, cache, mode="attn", incl_embeds=False).labels == (
        *("0_attn_out", "1_attn_out"),
    )
    heads = stack_head_results(model, cache, incl_remainder=True)
    assert heads.labels == (*(f"L{i}H{h}" for i in range(2) for h in range(4)), "remainder")
    full = full_resid_decomposition(model, cache).labels
    assert full[0] == "L0H0"
    assert full[8] == "L0N0"
    assert full[-3:] == ("embed", "pos_embed", "bias")
    with pytest.raises(InputError, match="not 'heads'"):
        decompose_resid(model, cache, mode="heads")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_head_adds_what_its_values_make_of_the_output_projection_alone(name: str) -> None:
    model, cache, _ = run(name)
    heads = stack_head_results(model, cache, incl_remainder=True)
    alone = torch.zeros_like(cache["z", 1])
    alone[:, :, 2] = cache["z", 1][:, :, 2]
    o = model.layers[1].attn.o.module
    expected = o(alone.flatten(-2)) - o(torch.zeros_like(alone).flatten(-2))
    close(heads.values[heads.labels.index("L1H2")], expected)
    close(heads.values.sum(0), cache["resid_final"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_neurons_add_up_to_the_mlp(name: str) -> None:
    model, cache, _ = run(name)
    bias = getattr(model.layers[1].mlp.down.module, "bias", None)
    each = get_neuron_results(model, cache, 1)
    close(each.sum(-2) + (0 if bias is None else bias), cache["mlp_out", 1])
    some = get_neuron_results(model, cache, 1, neuron_slice=[3, 5], pos_slice=-1)
    assert torch.equal(some, each[:, -1, [3, 5]])
    stack = stack_neuron_results(model, cache, layer=1, incl_remainder=True, pos_slice=-1)
    assert stack.labels[3] == "L0N3"
    close(stack.values.sum(0), cache["resid_pre", 1][:, -1])


def test_heads_behind_a_norm_go_through_it_with_its_recorded_scale() -> None:
    model, cache, _ = run("gemma2")
    heads = stack_head_results(model, cache, layer=1)
    close(heads.values.sum(0), cache["attn_out", 0])


def test_the_norm_of_the_layer_that_is_asked_for_is_applied() -> None:
    model, cache, _ = run("gpt2")
    stack = decompose_resid(model, cache, layer=1)
    normed = apply_norm_to_stack(model, cache, stack, layer=1)
    bias = model.layers[1].norm1.module.bias
    close(normed.values.sum(0) + bias, model.layers[1].norm1(cache["resid_pre", 1]))
    assert normed.labels == stack.labels


def test_a_cache_without_the_batch_axis_is_taken_apart_alike() -> None:
    model, _, ids = run("gpt2")
    _, cache = model.run_with_cache(ids[:1], remove_batch_dim=True)
    heads = stack_head_results(model, cache, incl_remainder=True)
    assert heads.values.shape == (9, 8, 32)
    close(heads.values.sum(0), cache["resid_final"])


def test_a_run_whose_stream_was_written_to_is_refused() -> None:
    model, _, ids = run("gpt2")
    with model.edit() as steered:
        steered.layers[0].resid_post[:, -1] += 5
    _, cache = steered.run_with_cache(ids)
    with pytest.raises(CacheError, match="do not add up to the recorded residual stream"):
        decompose_resid(model, cache)


def test_what_does_not_just_add_is_refused() -> None:
    net, inputs = make("bert")
    model = LanguageModel(net)
    _, cache = model.run_with_cache(**inputs)
    with pytest.raises(UnsupportedError, match="does not just add"):
        stack_head_results(model, cache, layer=1)
