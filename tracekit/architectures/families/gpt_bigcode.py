"""GPT BigCode: GPT-2 with one key and value for all heads, or with them head by head."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.layouts import HeadByHead, OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Stack

_ONE_KEY = Block(
    {
        "norm1": "ln_1",
        "attn": "attn",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "norm2": "ln_2",
        "mlp": "mlp",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    fused=OneBehindTheOther,
    when=says(multi_query=True),
)
_MANY_KEYS = replace(_ONE_KEY, fused=HeadByHead, when=otherwise)
FAMILY = Family(
    "gpt_bigcode",
    model_types=("gpt_bigcode",),
    modules={
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack("transformer.h", (_ONE_KEY, _MANY_KEYS), sizes={"kv_heads": "kv_heads"})
    },
)
