"""GLM and GLM-4: Llama with gate and up in one; GLM-4 also norms what is added."""

from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "glm4",
    model_types=("glm", "glm4"),
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
