"""Granite: Llama whose attention and MLP are multiplied by a number before they are added."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA, MODEL_OF_LLAMA

FAMILY = Family(
    "granite",
    model_types=("granite",),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        **ATTENTION_OF_LLAMA,
                        "norm2": "post_attention_layernorm",
                        **MLP_OF_LLAMA,
                    },
                    scale="residual_multiplier",
                ),
            ),
        )
    },
)
