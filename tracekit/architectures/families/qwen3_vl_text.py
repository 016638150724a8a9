"""The text model of Qwen3-VL, whose first layers are given image features once more."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import MLP_OF_LLAMA

_BLOCK = {
    "norm1": "input_layernorm",
    "attn": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    **MLP_OF_LLAMA,
}

FAMILY = Family(
    "qwen3_vl_text",
    model_types=("qwen3_vl_text",),
    modules={"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
    stacks={
        "layers": Stack(
            "model.layers",
            (Block(_BLOCK),),
            between="features of images are added behind each of the first layers",
        )
    },
)
