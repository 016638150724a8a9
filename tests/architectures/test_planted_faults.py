"""Wrong declarations are found, each at the name that is wrong: what proves names can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.architectures.readable import unreadable
from tests.tiny_models import make
from tracekit.architectures import family_of, known_families
from tracekit.architectures.binding import Names
from tracekit.architectures.check import prove
from tracekit.architectures.findings import Proof
from tracekit.architectures.layouts import Heads, OneBehindTheOther
from tracekit.architectures.schema import Family, Residual, Sharing, given, output


def proof_with(model: str, activations: Any = None, **block: Any) -> Proof:
    """The proof of a tiny model by its family's declaration, after a change of its block."""
    net, inputs = make(model)
    family = family_of(net)
    assert family is not None
    return prove(Names(changed(family, activations, **block), net), lambda: net(**inputs))


def changed(family: Family, activations: Any = None, modules: Any = None, **block: Any) -> Family:
    stack = family.stacks["layers"]
    old = stack.blocks[0]
    new = replace(
        old,
        activations={**old.activations, **(activations or {})},
        modules={**old.modules, **(modules or {})},
        **block,
    )
    return replace(family, stacks={"layers": replace(stack, blocks=(new,))})


def faults(proof: Proof) -> str:
    """Where and of what the claims are that fail, in lines."""
    return "\n".join(
        f"{each.where} {each.name}: {each.claim} ({each.why})" for each in proof.failed
    )


@pytest.mark.parametrize("model", ["gpt2", "llama", "gptj"])
def test_the_declarations_themselves_are_proved(model: str) -> None:
    proof = proof_with(model)
    assert proof, repr(proof)
    assert "PROVED" in repr(proof)


def test_attention_with_the_residual_in_it_is_found() -> None:
    proof = proof_with("llama", {"attn_out": given("norm2")})
    assert "layers.0 resid_mid: resid_pre + attn_out" in faults(proof)


def test_a_norm_that_is_said_to_be_behind_is_found() -> None:
    proof = proof_with("llama", residual=Residual.POST_NORM)
    assert "layers.0 resid_mid: norm1(resid_pre + attn_out)" in faults(proof)


def test_a_block_that_is_said_to_be_parallel_is_found() -> None:
    proof = proof_with("llama", residual=Residual.PARALLEL)
    found = "attn_out: a write moves nothing in front, or beside (layers.0 mlp_out has moved)"
    assert found in faults(proof)


def test_a_parallel_block_that_is_said_to_be_sequential_is_found() -> None:
    proof = proof_with("gptj", residual=Residual.SEQUENTIAL)
    assert "layers.0 resid_mid: resid_pre + attn_out" in faults(proof)


def test_queries_and_keys_in_each_others_place_are_found() -> None:
    proof = proof_with("gptj", modules={"q": "attn.k_proj", "k": "attn.q_proj"})
    assert "q: it is the query of attention (a write to it does not move the query)" in faults(
        proof
    )


def test_queries_and_keys_whose_heads_would_differ_in_width_are_not_handed_out() -> None:
    modules = {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}
    proof = proof_with("llama", modules=modules)
    assert proof
    assert not any(claim.name in ("q", "k") for claim in proof)


def test_fused_projections_in_the_wrong_order_are_found() -> None:
    proof = proof_with("gpt2", fused=lambda place: OneBehindTheOther((0, 2, 1)[place]))
    assert "k: it is the key of attention (a write to it does not move the key)" in faults(proof)
    assert "v: it is the value of attention" in faults(proof)


def test_heads_that_lie_otherwise_are_found() -> None:
    proof = proof_with("gpt2", {"q": output("qkv", Heads("heads"))})
    assert "layers.0 q: it is the query of attention (a write to it" in faults(proof)
    assert "q: apart from k" in faults(proof)


def test_a_wrong_number_of_heads_is_found() -> None:
    net, inputs = make("gpt2")
    family = family_of(net)
    assert family is not None
    sizes = dict.fromkeys(("heads", "kv_heads"), "num_hidden_layers")
    stack = replace(family.stacks["layers"], sizes=sizes)
    names = Names(replace(family, stacks={"layers": stack}), net)
    proof = prove(names, lambda: net(**inputs))
    assert "q: head 1 of it is head 1 of attention (attention has 4 heads, not 2)" in faults(proof)


def test_a_forgotten_scale_is_found() -> None:
    net, inputs = make("llama")
    for layer in net.model.layers:  # what is added is more by a half than the modules give
        layer.mlp.register_forward_hook(lambda _, __, out: out * 1.5)
    family = family_of(net)
    assert family is not None
    proof = prove(Names(family, net), lambda: net(**inputs))
    assert "layers.0 resid_post: resid_mid + mlp_out" in faults(proof)


def test_a_stream_that_is_said_to_be_a_norms_own_input_is_found() -> None:
    proof = proof_with("llama", {"resid_mid": given("norm2")})
    assert "layers.0 resid_mid: with a write to it, resid_post is still resid_mid" in faults(proof)


def test_the_input_of_the_mlp_that_is_said_to_be_the_stream_is_found() -> None:
    proof = proof_with("llama", {"mlp_in": given("norm2", sharing=Sharing.SHARED)})
    assert "layers.0 mlp_in" in faults(proof)


def test_a_value_of_a_module_that_does_not_run_is_found() -> None:
    net, inputs = make("llama")
    net.model.layers[0].idle = torch.nn.Linear(32, 32)
    modules = {"idle": "idle"}
    family = family_of(net)
    assert family is not None
    names = Names(changed(family, {"mlp_in": output("idle")}, modules), net)
    proof = prove(names, lambda: net(**inputs))
    assert "layers.0 mlp_in: [batch pos model] (model.layers.0.idle did not run)" in faults(proof)


def test_values_of_attention_that_are_declared_and_never_come_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, inputs = make("gptj")
    family = family_of(net)
    assert family is not None and not unreadable(net, inputs)
    declares_all = replace(family.stacks["layers"].blocks[0], activations={})
    layers = replace(family.stacks["layers"], blocks=(declares_all,))
    planted = replace(family, stacks={"layers": layers})
    monkeypatch.setitem(known_families(), "gptj", planted)
    found = unreadable(net, inputs)
    assert [each.split(":")[0] for each in found[:3]] == [
        f"transformer.h.0 {name}" for name in ("attn_q", "attn_k", "attn_v")
    ]
