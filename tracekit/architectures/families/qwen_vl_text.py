"""The text models of Qwen2-VL and Qwen2.5-VL: Llama's block."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA

_BLOCK = {
    "norm1": "input_layernorm",
    **ATTENTION_OF_LLAMA,
    "norm2": "post_attention_layernorm",
    **MLP_OF_LLAMA,
}

FAMILY = Family(
    "qwen_vl_text",
    model_types=("qwen2_vl_text", "qwen2_5_vl_text"),
    modules={"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
    stacks={"layers": Stack("model.layers", (Block(_BLOCK),))},
)
