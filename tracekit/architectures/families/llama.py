"""Llama and its heirs: pre-norm, rotary positions, a gated MLP; some norm queries and keys."""

from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "llama",
    model_types=(
        "llama",
        "ernie4_5",
        "gemma",
        "helium",
        "hunyuan_v1_dense",
        "ministral",
        "mistral",
        "olmo",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
    ),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        "attn": "self_attn",
                        "q": "self_attn.q_proj",
                        "k": "self_attn.k_proj",
                        "v": "self_attn.v_proj",
                        "o": "self_attn.o_proj",
                        "q_norm": ("self_attn.q_norm", "self_attn.query_layernorm"),
                        "k_norm": ("self_attn.k_norm", "self_attn.key_layernorm"),
                        "norm2": "post_attention_layernorm",
                        "mlp": "mlp",
                        "gate": "mlp.gate_proj",
                        "up": "mlp.up_proj",
                        "down": "mlp.down_proj",
                    },
                ),
            ),
        )
    },
)
