"""Cohere and Cohere 2: one norm in front of attention and MLP, which are added in one sum."""

from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA, MODEL_OF_LLAMA

FAMILY = Family(
    "cohere",
    model_types=("cohere", "cohere2"),
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
                        **MLP_OF_LLAMA,
                    },
                    residual=Residual.PARALLEL,
                ),
            ),
        )
    },
)
