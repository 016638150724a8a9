"""Jamba: Mamba or attention, and experts or an MLP, in each layer."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import (
    MAMBA_1,
    MAMBA_1_SIZES,
    ROUTED,
    ROUTED_BEFORE_5,
    mamba_1_modules,
)
from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA

_ATTENTION = Block(
    {
        "norm1": "input_layernorm",
        **ATTENTION_OF_LLAMA,
    },
    when=has("self_attn"),
)
_MAMBA = Block(
    mamba_1_modules("mamba", "input_layernorm"),
    activations=MAMBA_1,
    sizes=MAMBA_1_SIZES,
    when=has("mamba"),
)
_MLP = {"norm2": "pre_ff_layernorm", "mlp": "feed_forward"}
_DENSE = Block(
    {
        **_MLP,
        "gate": "feed_forward.gate_proj",
        "up": "feed_forward.up_proj",
        "down": "feed_forward.down_proj",
    },
    when=otherwise,
)
_SPARSE = Block(
    {**_MLP, "router": "feed_forward.router", "experts": "feed_forward.experts"},
    activations=ROUTED,
    when=has("feed_forward.experts"),
)
_SPARSE_BEFORE_5 = replace(_SPARSE, activations=ROUTED_BEFORE_5, when=has("feed_forward.experts.0"))
FAMILY = Family(
    "jamba",
    model_types=("jamba",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "model.layers",
            tuple(
                mixer & mlp
                for mixer in (_ATTENTION, _MAMBA)
                for mlp in (_SPARSE_BEFORE_5, _SPARSE, _DENSE)
            ),
        )
    },
)
