"""OLMo 2 and 3, EXAONE 4: no norms in front, but of what attention and MLP add."""

from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "olmo2",
    model_types=("olmo2", "olmo3", "exaone4"),
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
                        "attn": "self_attn",
                        "q": "self_attn.q_proj",
                        "k": "self_attn.k_proj",
                        "v": "self_attn.v_proj",
                        "o": "self_attn.o_proj",
                        "q_norm": "self_attn.q_norm",
                        "k_norm": "self_attn.k_norm",
                        "norm1_post": "post_attention_layernorm",
                        "mlp": "mlp",
                        "gate": "mlp.gate_proj",
                        "up": "mlp.up_proj",
                        "down": "mlp.down_proj",
                        "norm2_post": "post_feedforward_layernorm",
                    },
                ),
            ),
        )
    },
)
