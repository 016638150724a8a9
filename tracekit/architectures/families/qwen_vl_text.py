"""The text models of Qwen2-VL and Qwen2.5-VL: Llama's block."""

from tracekit.architectures.schema import Block, Family, Stack

_BLOCK = {
    "norm1": "input_layernorm",
    "attn": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp": "mlp",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

FAMILY = Family(
    "qwen_vl_text",
    model_types=("qwen2_vl_text", "qwen2_5_vl_text"),
    modules={"embed": "model.embed_tokens", "final_norm": "model.norm", "unembed": "lm_head"},
    stacks={"layers": Stack("model.layers", (Block(_BLOCK),))},
)
