"""Gemma 2 and 3: norms in front of attention and MLP, and norms of what they add."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA, MODEL_OF_LLAMA

FAMILY = Family(
    "gemma2",
    model_types=("gemma2", "gemma3_text"),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        **ATTENTION_OF_LLAMA,
                        "q_norm": "self_attn.q_norm",
                        "k_norm": "self_attn.k_norm",
                        "norm1_post": "post_attention_layernorm",
                        "norm2": "pre_feedforward_layernorm",
                        **MLP_OF_LLAMA,
                        "norm2_post": "post_feedforward_layernorm",
                    },
                ),
            ),
        )
    },
)
