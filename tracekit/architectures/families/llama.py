"""Llama and its heirs: pre-norm, rotary positions, a gated MLP; some norm queries and keys."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA, MODEL_OF_LLAMA

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
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        **ATTENTION_OF_LLAMA,
                        "q_norm": ("self_attn.q_norm", "self_attn.query_layernorm"),
                        "k_norm": ("self_attn.k_norm", "self_attn.key_layernorm"),
                        "norm2": "post_attention_layernorm",
                        **MLP_OF_LLAMA,
                    },
                ),
            ),
        )
    },
)
