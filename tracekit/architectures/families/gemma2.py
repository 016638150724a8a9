"""Gemma 2 and 3: norms in front of attention and MLP, and norms of what they add."""

from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "gemma2",
    model_types=("gemma2", "gemma3_text"),
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
                        "norm1_post": "post_attention_layernorm",
                        "norm2": "pre_feedforward_layernorm",
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
