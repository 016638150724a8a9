"""Persimmon: pre-norm, queries, keys and values head by head, an MLP without a gate."""

from tracekit.architectures.layouts import HeadByHead
from tracekit.architectures.schema import Block, Family, Stack, output

_BLOCK = Block(
    {
        "norm1": "input_layernorm",
        "attn": "self_attn",
        "qkv": "self_attn.query_key_value",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "o": "self_attn.dense",
        "norm2": "post_attention_layernorm",
        "mlp": "mlp",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    fused=HeadByHead,
    activations={"mlp_out": output("", inside="dropout")},
)
FAMILY = Family(
    "persimmon",
    model_types=("persimmon",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_BLOCK,))},
)
