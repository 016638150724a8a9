"""What families of decoders do in ways of their own, held against hooks and hand-made sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.architectures.readable import unreadable
from tests.architectures.stirred import stirred
from tests.matrix.decoder_relatives import SPECS as RELATIVES
from tests.tiny_models import IS_TRANSFORMERS_5, SPECS, make
from tracekit import LanguageModel
from tracekit.architectures import names_of
from tracekit.architectures.check import prove
from tracekit.errors import MissingNameError, UnsupportedError

pytestmark = pytest.mark.usefixtures("without_gradients")

WITH_5 = pytest.mark.skipif("granitemoehybrid" not in SPECS, reason="laid out otherwise before 5")


def stirred_model(name: str, **config: Any) -> tuple[LanguageModel, dict[str, Any]]:
    net, inputs = make(name, **config)
    return LanguageModel(stirred(net)), inputs


def hooked(model: LanguageModel, inputs: dict[str, Any], *paths: str) -> list[Tensor]:
    """What the modules at these paths return, their first tensor, by plain hooks."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, value: Any) -> None:
        seen[path] = (value[0] if isinstance(value, tuple) else value).clone()

    handles = [
        model.module.get_submodule(path).register_forward_hook(
            lambda _module, _args, out, path=path: keep(path, out)
        )
        for path in paths
    ]
    model.module(**inputs)
    for handle in handles:
        handle.remove()
    return [seen[path] for path in paths]


def read(model: LanguageModel, inputs: dict[str, Any], layer: int, *names: str) -> list[Tensor]:
    """Named values of one layer, each read in a trace of its own."""
    found: list[Tensor] = []
    for name in names:
        with model.trace(**inputs):
            value = getattr(model.layers[layer], name).clone()
        found.append(value)
    return found


# -- every family: proved without writes, in all its variants --------------------------------------

VARIANTS = {
    "neox, one behind the other": ("gpt_neox", dict(use_parallel_residual=False)),
    "opt, norms behind": ("opt", dict(do_layer_norm_before=False)),
    "falcon 40b": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon 2": (
        "falcon",
        dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    ),
    "falcon rw": ("falcon", dict(multi_query=False, parallel_attn=False, alibi=True)),
    "falcon, keys for each": ("falcon", dict(multi_query=False)),
    "bloom, sums over norms": ("bloom", dict(apply_residual_connection_post_layernorm=True)),
    "stablelm, one sum": ("stablelm", dict(use_parallel_residual=True)),
    "bigcode, keys for each": ("gpt_bigcode", dict(multi_query=False)),
    "falcon h1, normed": ("falcon_h1", dict(mamba_rms_norm=True, ssm_out_multiplier=0.5)),
    "qwen3 moe, a dense layer": ("qwen3_moe", dict(mlp_only_layers=[0])),
    "llama 4, a dense layer": ("llama4_text", dict(moe_layers=[1])),
    "deepseek, whole queries": ("deepseek_v3", dict(q_lora_rank=None)),
    "mobilebert, wide": ("mobilebert", dict(use_bottleneck=False)),
    "mobilebert, one mlp": (
        "mobilebert",
        dict(use_bottleneck=False, num_feedforward_networks=1, normalization_type="layer_norm"),
    ),
    "mamba2, two groups": ("mamba2", dict(n_groups=2)),
}


@pytest.mark.parametrize("name", [*RELATIVES])
def test_the_names_of_relatives_are_proved(name: str) -> None:
    model, inputs = stirred_model(name)
    assert_proved(model.module, inputs)


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_the_names_of_variants_are_proved(variant: str) -> None:
    name, config = VARIANTS[variant]
    model, inputs = stirred_model(name, **config)
    assert_proved(model.module, inputs)


def assert_proved(net: nn.Module, inputs: dict[str, Any]) -> None:
    names = names_of(net)
    assert names is not None
    proof = prove(names, lambda: net(**inputs), with_writes=False)
    assert proof, repr(proof)
    if IS_TRANSFORMERS_5:  # some computed their attention themselves before
        assert not unreadable(net, inputs)


# -- sums ------------------------------------------------------------------------------------------


def test_what_blooms_attention_adds_is_without_the_residual_stream_that_it_returns_too() -> None:
    model, inputs = stirred_model("bloom")
    path = "transformer.h.0.self_attention"
    dense, whole = hooked(model, inputs, f"{path}.dense", path)
    pre, out, mid = read(model, inputs, 0, "resid_pre", "attn_out", "resid_mid")
    assert torch.equal(out, dense)
    assert not torch.equal(out, whole)
    torch.testing.assert_close(mid, whole)
    torch.testing.assert_close(pre + out, mid)


@pytest.mark.parametrize("in_parallel", [True, False])
def test_neox_adds_up_in_both_its_ways(in_parallel: bool) -> None:
    model, inputs = stirred_model("gpt_neox", use_parallel_residual=in_parallel)
    pre, attn, mlp, post = read(model, inputs, 1, "resid_pre", "attn_out", "mlp_out", "resid_post")
    torch.testing.assert_close(pre + attn + mlp, post)
    if in_parallel:
        with pytest.raises(MissingNameError, match="one sum"), model.trace(**inputs):
            model.layers[1].resid_mid
    else:
        (mid,) = read(model, inputs, 1, "resid_mid")
        torch.testing.assert_close(pre + attn, mid)


def test_granite_multiplies_before_it_adds() -> None:
    model, inputs = stirred_model("granite")
    pre, attn, mid = read(model, inputs, 0, "resid_pre", "attn_out", "resid_mid")
    torch.testing.assert_close(pre + 0.5 * attn, mid)
    mlp, post = read(model, inputs, 0, "mlp_out", "resid_post")
    torch.testing.assert_close(mid + 0.5 * mlp, post)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "glm4"])
def test_what_is_added_is_what_the_norm_behind_gives(name: str) -> None:
    model, inputs = stirred_model(name)
    pre, attn, mid = read(model, inputs, 0, "resid_pre", "attn_out", "resid_mid")
    (raw,) = hooked(model, inputs, "model.layers.0.self_attn")
    assert not torch.allclose(raw, attn)
    torch.testing.assert_close(pre + attn, mid)


def test_mobileberts_blocks_add_what_their_narrow_stream_becomes() -> None:
    model, inputs = stirred_model("mobilebert")
    pre, post, z = read(model, inputs, 1, "resid_pre", "resid_post", "z")
    layer = model.layers[1].module
    path = "mobilebert.encoder.layer.1"
    added, start, mid = hooked(
        model,
        inputs,
        f"{path}.output.bottleneck.dense",
        f"{path}.bottleneck.input",
        f"{path}.attention",
    )
    torch.testing.assert_close(layer.output.bottleneck.LayerNorm(pre + added), post)
    attended = layer.attention.output.dense(z.flatten(2))
    torch.testing.assert_close(layer.attention.output.LayerNorm(start + attended), mid)
    for name in ("attn_out", "resid_mid", "W_Q", "W_O"):
        with pytest.raises(MissingNameError, match="narrow stream"), model.trace(**inputs):
            getattr(model.layers[1], name)


@pytest.mark.parametrize("count", [1, 3])
def test_mobilebert_without_a_bottleneck_norms_behind_attention(count: int) -> None:
    config = dict(use_bottleneck=False, num_feedforward_networks=count)
    model, inputs = stirred_model("mobilebert", **config)
    pre, attn, mid = read(model, inputs, 0, "resid_pre", "attn_out", "resid_mid")
    torch.testing.assert_close(model.layers[0].norm1.module(pre + attn), mid)


def test_falcon_overwrites_what_its_mlp_gives_and_the_name_still_has_it() -> None:
    model, inputs = stirred_model("falcon")
    (mlp,) = hooked(model, inputs, "transformer.h.0.mlp")
    (named,) = read(model, inputs, 0, "mlp_out")
    assert torch.equal(named, mlp)


def test_falcon_h1_adds_attention_and_mixer_each_with_its_number() -> None:
    numbers = dict(ssm_out_multiplier=0.5, attention_out_multiplier=0.25)
    model, inputs = stirred_model("falcon_h1", **numbers)
    pre, attn, ssm, mid = read(model, inputs, 1, "resid_pre", "attn_out", "ssm_out", "resid_mid")
    torch.testing.assert_close(pre + 0.25 * attn + 0.5 * ssm, mid)


@WITH_5
def test_granite_4_adds_experts_and_a_shared_mlp() -> None:
    model, inputs = stirred_model("granitemoehybrid", residual_multiplier=0.5)
    names = ("resid_mid", "experts_out", "shared_expert_out", "resid_post")
    mid, experts, shared, post = read(model, inputs, 1, *names)
    torch.testing.assert_close(mid + 0.5 * (experts.view_as(mid) + shared), post)


# -- queries, keys, values -------------------------------------------------------------------------


def test_a_write_for_attention_alone_leaves_the_mlp_that_reads_the_same_norm() -> None:
    model, inputs = stirred_model("gptj")
    (before,) = read(model, inputs, 0, "mlp_out")
    with model.trace(**inputs):
        model.layers[0].attn_in[:] = 0
        after = model.layers[0].mlp_out.clone()
    assert torch.equal(before, after)


def test_falcons_queries_by_groups_are_no_view_and_its_keys_are() -> None:
    config = dict(new_decoder_architecture=True, num_kv_heads=2)
    model, inputs = stirred_model("falcon", **config)
    fused = hooked(model, inputs, "transformer.h.0.self_attention.query_key_value")[0]
    (k,) = read(model, inputs, 0, "k")
    assert torch.equal(k, fused.view(2, 8, 2, 4, 8)[:, :, :, 2])  # two queries of each group
    with pytest.raises(MissingNameError, match="use attn_q"), model.trace(**inputs):
        model.layers[0].q


def test_codegens_values_are_in_the_middle_of_each_quarter_and_no_view_has_them_all() -> None:
    model, inputs = stirred_model("codegen")
    quarters = hooked(model, inputs, "transformer.h.1.attn.qkv_proj")[0].view(2, 8, 4, 3, 2, 4)
    values = quarters[:, :, :, 1].flatten(2, 3).transpose(1, 2)
    pattern, z = read(model, inputs, 1, "pattern", "z")
    torch.testing.assert_close((pattern @ values).transpose(1, 2), z)
    for name in ("q", "k", "v"):
        with pytest.raises(MissingNameError, match="quarter"), model.trace(**inputs):
            getattr(model.layers[1], name)


def test_deepseeks_keys_are_not_to_be_had_as_projected() -> None:
    model, inputs = stirred_model("deepseek_v3")
    with pytest.raises(MissingNameError, match="use attn_k"), model.trace(**inputs):
        model.layers[0].k
    (q,) = read(model, inputs, 0, "q")
    assert torch.equal(q.flatten(2), hooked(model, inputs, "model.layers.0.self_attn.q_b_proj")[0])


def test_qwen3_next_has_a_gate_beside_each_query() -> None:
    model, inputs = stirred_model("qwen3_next")
    both = hooked(model, inputs, "model.layers.1.self_attn.q_proj")[0].view(2, 8, 4, 16)
    q, gate, gated = read(model, inputs, 1, "q", "attn_gate", "z_gated")
    assert torch.equal(q, both[..., :8])
    assert torch.equal(gate, both[..., 8:])
    o = model.layers[1].attn.o.module
    (out,) = read(model, inputs, 1, "attn_out")
    torch.testing.assert_close(gated.flatten(2) @ o.weight.T, out)


def test_phi3s_gate_is_the_first_half() -> None:
    model, inputs = stirred_model("phi3")
    pre, linear, post = read(model, inputs, 0, "mlp_pre", "mlp_pre_linear", "mlp_post")
    torch.testing.assert_close(F.silu(pre) * linear, post)
    assert not torch.allclose(F.silu(linear) * pre, post)


# -- experts ---------------------------------------------------------------------------------------


@WITH_5
def test_the_chosen_experts_are_written_and_the_logits_behind_the_choice_are_not() -> None:
    model, inputs = stirred_model("mixtral")
    weights, experts = read(model, inputs, 0, "router_weights", "experts_out")
    with model.trace(**inputs):
        model.layers[0].router_weights = 2 * weights
        doubled = model.layers[0].experts_out.clone()
    torch.testing.assert_close(doubled, 2 * experts)
    with pytest.raises(UnsupportedError, match="router_logits can't be written"):
        with model.trace(**inputs):
            model.layers[0].router_logits = torch.zeros(16, 4)


@WITH_5
def test_the_neurons_of_fused_experts_are_not_to_be_seen() -> None:
    model, inputs = stirred_model("mixtral")
    with pytest.raises(MissingNameError, match="experts are one module"), model.trace(**inputs):
        model.layers[0].mlp_pre


# -- mixers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_gate_that_is_shut_lets_nothing_of_a_mixer_through(name: str) -> None:
    model, inputs = stirred_model(name)
    with model.trace(**inputs):
        model.layers[0].ssm_gate[:] = 0  # silu(0) is 0
        inner = model.layers[0].ssm_inner.clone()
    assert (inner == 0).all()


def test_mamba_reads_its_state_by_what_ssm_c_says() -> None:
    model, inputs = stirred_model("mamba")
    mixer = model.layers[0].ssm.module
    with model.trace(**inputs):
        conv = model.layers[0].ssm_conv_out.clone()
        model.layers[0].ssm_c[:] = 0  # nothing is read: what is left is what skips the state
        inner = model.layers[0].ssm_inner.clone()
    (gate,) = read(model, inputs, 0, "ssm_gate")
    torch.testing.assert_close(inner, conv * mixer.D * F.silu(gate))


def test_what_a_mamba2_layer_projects_is_divided_without_a_rest() -> None:
    model, inputs = stirred_model("mamba2")
    parts = read(model, inputs, 0, "ssm_gate", "ssm_x", "ssm_b", "ssm_c", "ssm_dt")
    (whole,) = read(model, inputs, 0, "ssm_in")
    assert torch.equal(torch.cat(parts, -1), whole)


def test_recurrent_gemmas_recurrence_goes_on_from_its_last_position() -> None:
    model, inputs = stirred_model("recurrent_gemma")
    scan, gate, inner = read(model, inputs, 0, "ssm_scan", "ssm_gate", "ssm_inner")
    torch.testing.assert_close(scan * F.gelu(gate, approximate="tanh"), inner)


def test_rwkv_norms_its_embeddings_in_the_first_layer() -> None:
    model, inputs = stirred_model("rwkv")
    pre, out, mid = read(model, inputs, 0, "resid_pre", "ssm_out", "resid_mid")
    (normed,) = hooked(model, inputs, "rwkv.blocks.0.pre_ln")
    assert torch.equal(pre, normed)
    torch.testing.assert_close(pre + out, mid)


def test_layers_of_zamba_that_share_a_block_have_each_its_own_call_of_it() -> None:
    kinds = ["mamba", "hybrid", "hybrid"]
    model, inputs = stirred_model("zamba2", layers_block_type=kinds, num_mem_blocks=1)
    seen: list[Tensor] = []
    projections = {model.layers[each].attn.o.module for each in (1, 2)}  # one, before 5
    handles = [
        each.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
        for each in projections
    ]
    model.module(**inputs)
    for handle in handles:
        handle.remove()
    one, two = (read(model, inputs, each, "z")[0].flatten(2) for each in (1, 2))
    torch.testing.assert_close(one, seen[0])
    torch.testing.assert_close(two, seen[1])
    assert not torch.allclose(one, two)
    assert_proved(model.module, inputs)


def test_what_zambas_shared_block_gives_is_read_by_the_mixer_and_not_added() -> None:
    model, inputs = stirred_model("zamba2")
    pre, shared, mixed = read(model, inputs, 1, "resid_pre", "shared_out", "mixer_in")
    out, post = read(model, inputs, 1, "ssm_out", "resid_post")
    torch.testing.assert_close(pre + shared, mixed)
    torch.testing.assert_close(pre + out, post)
    with pytest.raises(MissingNameError, match="use shared_out"), model.trace(**inputs):
        model.layers[1].attn_out
