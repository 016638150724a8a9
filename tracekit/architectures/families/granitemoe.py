"""Granite MoE: Granite with experts for an MLP."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import ROUTED, ROUTED_BEFORE_5
from tracekit.architectures.schema import Block, Family, Stack, output

_BLOCK = Block(
    {
        "norm1": "input_layernorm",
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "mlp": "block_sparse_moe",
        "router": "block_sparse_moe.router",
        "experts": "block_sparse_moe.experts",
    },
    activations=ROUTED,
    scale="residual_multiplier",
    when=otherwise,
)
_BEFORE_5 = replace(
    _BLOCK,
    activations={**ROUTED_BEFORE_5, "router_logits": output("router", inside="layer")},
    when=has("block_sparse_moe.router.layer"),
)
FAMILY = Family(
    "granitemoe",
    model_types=("granitemoe",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_BEFORE_5, _BLOCK))},
)
