"""GLM and GLM-4: Llama with gate and up in one; GLM-4 also norms what is added."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MODEL_OF_LLAMA

FAMILY = Family(
    "glm4",
    model_types=("glm", "glm4"),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        **ATTENTION_OF_LLAMA,
                        "norm1_post": "post_self_attn_layernorm",
                        "norm2": "post_attention_layernorm",
                        "mlp": "mlp",
                        "gate_up": "mlp.gate_up_proj",
                        "down": "mlp.down_proj",
                        "norm2_post": "post_mlp_layernorm",
                    },
                ),
            ),
        )
    },
)
