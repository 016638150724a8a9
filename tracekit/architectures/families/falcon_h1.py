"""Falcon-H1: attention and Mamba-2 side by side, each multiplied before both are added."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.mixers import MAMBA_2, MAMBA_2_SIZES, mamba_2_modules
from tracekit.architectures.schema import (
    Block,
    Family,
    Lacks,
    Sharing,
    Stack,
    given,
)
from tracekit.architectures.shared import ATTENTION_OF_LLAMA

_NORMED = Block(
    {
        **mamba_2_modules("mamba", "input_layernorm"),
        **ATTENTION_OF_LLAMA,
        "norm2": "pre_ff_layernorm",
        "mlp": "feed_forward",
        "gate": "feed_forward.gate_proj",
        "up": "feed_forward.up_proj",
        "down": "feed_forward.down_proj",
    },
    activations={
        **MAMBA_2,
        # One norm for both, and a number between it and attention.
        "attn_in": given("attn"),
        "mixer_in": given("ssm", sharing=Sharing.APART),
        "mlp_pre": given("mlp", inside="act_fn"),
    },
    scale={"attn_out": "attention_out_multiplier", "ssm_out": "ssm_out_multiplier"},
    sizes=MAMBA_2_SIZES,
    when=says(mamba_rms_norm=True),
)
_UNNORMED = replace(
    _NORMED,
    activations={
        **_NORMED.activations,
        "ssm_scan": Lacks("it is gated without a module: use ssm_inner, which is gated"),
    },
    when=otherwise,
)
FAMILY = Family(
    "falcon_h1",
    model_types=("falcon_h1",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_NORMED, _UNNORMED))},
)
