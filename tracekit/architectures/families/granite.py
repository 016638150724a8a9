"""Granite: Llama whose attention and MLP are multiplied by a number before they are added."""

from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "granite",
    model_types=("granite",),
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
                        "norm2": "post_attention_layernorm",
                        "mlp": "mlp",
                        "gate": "mlp.gate_proj",
                        "up": "mlp.up_proj",
                        "down": "mlp.down_proj",
                    },
                    scale="residual_multiplier",
                ),
            ),
        )
    },
)
