"""T5Gemma: Gemma's block in an encoder and, with cross-attention, in a decoder."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA

_BLOCK = {
    "norm1": "pre_self_attn_layernorm",
    **ATTENTION_OF_LLAMA,
    "norm1_post": "post_self_attn_layernorm",
    "norm2": "pre_feedforward_layernorm",
    **MLP_OF_LLAMA,
    "norm2_post": "post_feedforward_layernorm",
}
_CROSS_ATTENTION = {
    "cross_norm": "pre_cross_attn_layernorm",
    "cross_attn": "cross_attn",
    "cross_q": "cross_attn.q_proj",
    "cross_k": "cross_attn.k_proj",
    "cross_v": "cross_attn.v_proj",
    "cross_o": "cross_attn.o_proj",
    "cross_norm_post": "post_cross_attn_layernorm",
}

FAMILY = Family(
    "t5gemma",
    model_types=("t5gemma",),
    modules={
        "embed": "model.decoder.embed_tokens",
        "final_norm": "model.decoder.norm",
        "encoder": "model.encoder",
        "encoder_norm": "model.encoder.norm",
        "unembed": "lm_head.out_proj",
    },
    stacks={
        "layers": Stack(
            "model.decoder.layers", (Block({**_BLOCK, **_CROSS_ATTENTION}),), config="decoder"
        ),
        "encoder_layers": Stack("model.encoder.layers", (Block(_BLOCK),), config="encoder"),
    },
)
