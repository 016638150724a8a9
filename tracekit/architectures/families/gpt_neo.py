"""GPT-Neo: GPT-2 with separate projections, every other layer attending to a window."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import OWN_SOFTMAX

FAMILY = Family(
    "gpt_neo",
    model_types=("gpt_neo",),
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
                        "attn_core": "attn.attention",
                        "q": "attn.attention.q_proj",
                        "k": "attn.attention.k_proj",
                        "v": "attn.attention.v_proj",
                        "o": "attn.attention.out_proj",
                        "norm2": "ln_2",
                        "mlp": "mlp",
                        "up": "mlp.c_fc",
                        "down": "mlp.c_proj",
                    },
                    activations=OWN_SOFTMAX,
                ),
            ),
        )
    },
)
