"""Cohere and Cohere 2: one norm in front of attention and MLP, which are added in one sum."""

from tracekit.architectures.schema import Block, Family, Residual, Stack

FAMILY = Family(
    "cohere",
    model_types=("cohere", "cohere2"),
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
                        "q_norm": "self_attn.q_norm",
                        "k_norm": "self_attn.k_norm",
                        "mlp": "mlp",
                        "gate": "mlp.gate_proj",
                        "up": "mlp.up_proj",
                        "down": "mlp.down_proj",
                    },
                    residual=Residual.PARALLEL,
                ),
            ),
        )
    },
)
