"""GPT-2: learned positions, pre-norm, queries, keys and values in one projection."""

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "gpt2",
    model_types=("gpt2",),
    modules={
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "transformer.h",
            (
                Block(
                    {
                        "norm1": "ln_1",
                        "attn": "attn",
                        "qkv": "attn.c_attn",
                        "o": "attn.c_proj",
                        "cross_norm": "ln_cross_attn",
                        "cross_attn": "crossattention",
                        "cross_q": "crossattention.q_attn",
                        "cross_o": "crossattention.c_proj",
                        "norm2": "ln_2",
                        "mlp": "mlp",
                        "up": "mlp.c_fc",
                        "down": "mlp.c_proj",
                    },
                    fused=OneBehindTheOther,
                ),
            ),
        )
    },
)
