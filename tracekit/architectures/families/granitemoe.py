"""Granite MoE: Granite with experts for an MLP."""

from tracekit.architectures.mixers import ROUTED
from tracekit.architectures.schema import Block, Family, Stack

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
)
FAMILY = Family(
    "granitemoe",
    model_types=("granitemoe",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_BLOCK,))},
)
