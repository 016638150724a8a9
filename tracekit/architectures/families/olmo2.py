"""OLMo 2 and 3, EXAONE 4: no norms in front, but of what attention and MLP add."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MLP_OF_LLAMA, MODEL_OF_LLAMA

FAMILY = Family(
    "olmo2",
    model_types=("olmo2", "olmo3", "exaone4"),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        **ATTENTION_OF_LLAMA,
                        "q_norm": "self_attn.q_norm",
                        "k_norm": "self_attn.k_norm",
                        "norm1_post": "post_attention_layernorm",
                        **MLP_OF_LLAMA,
                        "norm2_post": "post_feedforward_layernorm",
                    },
                ),
            ),
        )
    },
)
