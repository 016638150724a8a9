"""Where activations are, by rule: from the words that a block has modules for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tracekit.architectures.layouts import Chunk, Heads, HeadsFirst
from tracekit.architectures.schema import (
    Block,
    Declared,
    Lacks,
    Point,
    Residual,
    Sharing,
    attended,
    given,
    output,
)

_SHARED, _APART = Sharing.SHARED, Sharing.APART
_ONE_SUM = Lacks("attention and MLP are added in one sum: there is nothing between them")
_ALONE = Lacks("the block has one mixer or MLP alone: there is nothing in the middle")

_NO_NEURONS = Lacks("the experts are one module for all: their neurons are not to be seen")
_NEURONS = (output("gate"), output("gate_up", Chunk(0)), output("up"))
_ATTN_IN = (given("norm1", sharing=_APART), given("attn", sharing=_APART))
_MIXER_IN = tuple(given(each, sharing=_APART) for each in ("norm1", "ssm", "conv"))

_EVERYWHERE: Final[Mapping[str, Declared]] = {
    "resid_pre": given(""),
    "resid_post": output(""),
    "q": output("q", Heads("heads")),
    "k": output("k", Heads("kv_heads")),
    "v": output("v", Heads("kv_heads")),
    "attn_q": attended("q", HeadsFirst()),
    "attn_k": attended("k", HeadsFirst()),
    "attn_v": attended("v", HeadsFirst()),
    "scores": attended("scores"),
    "pattern": attended("pattern"),
    "z": given("o", Heads("heads")),
    "head_result": Point("o", output("").slot, inside="head_result"),
    "norm1_scale": output("norm1", inside="norm_scale"),
    "norm1_normalized": output("norm1", inside="norm_normalized"),
    "norm2_scale": output("norm2", inside="norm_scale"),
    "norm2_normalized": output("norm2", inside="norm_normalized"),
    "attn_out": (output("attn_scale"), output("norm1_post"), output("attn")),
    "ssm_out": output("ssm"),
    "ssm_in": output("in_proj"),
    "ssm_inner": given("out_proj"),
    "conv_out": output("conv"),
    "cross_q": output("cross_q", Heads("heads")),
    "cross_attn_q": attended("q", HeadsFirst(), "cross_core"),
    "cross_attn_k": attended("k", HeadsFirst(), "cross_core"),
    "cross_attn_v": attended("v", HeadsFirst(), "cross_core"),
    "cross_scores": attended("scores", core="cross_core"),
    "cross_pattern": attended("pattern", core="cross_core"),
    "cross_z": given("cross_o", Heads("heads")),
    "cross_attn_out": (output("cross_norm_post"), output("cross_attn")),
    "mlp_pre": _NEURONS,
    "mlp_post": given("down"),
    "mlp_gate": output("down_gate"),
    "router_logits": output("router"),
    "experts_out": output("experts"),
    "shared_expert_out": output("shared_expert"),
    "mlp_out": (
        output("mlp_scale"),
        output("norm2_post"),
        output("mlp"),
        output("down"),
    ),
}
_BY_RESIDUAL: Final[Mapping[Residual, Mapping[str, Declared]]] = {
    Residual.SEQUENTIAL: {
        "attn_in": _ATTN_IN,
        "mixer_in": _MIXER_IN,
        "resid_cross": given("cross_norm", sharing=_SHARED),
        "resid_mid": (given("norm2", sharing=_SHARED), given("mlp", sharing=_SHARED)),
        "mlp_in": (given("norm2", sharing=_APART), given("mlp", sharing=_APART)),
    },
    Residual.PARALLEL: {
        "attn_in": _ATTN_IN,
        "mixer_in": _MIXER_IN,
        "mlp_in": (given("norm2", sharing=_APART), given("mlp", sharing=_APART)),
        "resid_mid": _ONE_SUM,
    },
    Residual.POST_NORM: {
        "attn_in": given("attn_core", sharing=_APART),
        "resid_cross": given("cross_attn", sharing=_SHARED),
        "resid_mid": (output("cross_norm"), output("norm1")),
        "mlp_in": (given("mlp", sharing=_APART), given("up", sharing=_APART)),
        # Often the attention module ends with its norm.
        "attn_out": (output("o"), output("attn")),
        "cross_attn_out": (output("cross_o"), output("cross_attn")),
    },
    Residual.SINGLE: {
        "attn_in": _ATTN_IN,
        "mixer_in": _MIXER_IN,
        "mlp_in": (given("norm2", sharing=_APART), given("mlp", sharing=_APART)),
        "resid_mid": _ALONE,
    },
    Residual.OTHER: {},
}


# One norm in front of attention and MLP: what it is given would be written for both.
_ONE_NORM: Final[Mapping[str, Declared]] = {
    "attn_in": given("attn", sharing=_APART),
    "mlp_in": given("mlp", sharing=_APART),
}


def declared(block: Block) -> dict[str, Declared]:
    """Where each activation of a block is, or why it is not there; those by rule, and its own."""
    found = {**_EVERYWHERE, **_BY_RESIDUAL[block.residual]}
    if block.residual is Residual.PARALLEL and "norm2" not in block.modules:
        found |= _ONE_NORM
    if "attn" not in block.modules:
        del found["attn_in"]
    if "ssm" not in block.modules and "conv" not in block.modules:
        found.pop("mixer_in", None)
    if block.fused is not None:
        for place, name in enumerate(("q", "k", "v")):
            found[name] = output("qkv", block.fused(place))
    if "gate" in block.modules:
        found["mlp_pre_linear"] = output("up")
    elif "gate_up" in block.modules:
        found["mlp_pre_linear"] = output("gate_up", Chunk(1))
    if "experts" in block.modules:
        found |= {"mlp_pre": (*_NEURONS, _NO_NEURONS), "mlp_post": (given("down"), _NO_NEURONS)}
    return {**found, **block.activations}
