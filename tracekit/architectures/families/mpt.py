"""MPT: pre-norm without biases, ALiBi; the MLP adds the residual stream itself."""

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Stack, output
from tracekit.architectures.shared import OWN_SOFTMAX

_BLOCK = Block(
    {
        "norm1": "norm_1",
        "attn": "attn",
        "qkv": "attn.Wqkv",
        "o": "attn.out_proj",
        "norm2": "norm_2",
        "mlp": "ffn",
        "up": "ffn.up_proj",
        "down": "ffn.down_proj",
    },
    fused=OneBehindTheOther,
    activations={
        **OWN_SOFTMAX,
        "attn_out": output("", inside="resid_attn_dropout"),
        "mlp_out": output("down"),
    },
)
FAMILY = Family(
    "mpt",
    model_types=("mpt",),
    modules={
        "embed": "transformer.wte",
        "final_norm": "transformer.norm_f",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("transformer.blocks", (_BLOCK,))},
)
