"""Bamba: Mamba-2 or attention, then a gated MLP."""

from tracekit.architectures.mixers import MAMBA_2, MAMBA_2_SIZES, mamba_2_modules
from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import ATTENTION_OF_LLAMA

_MLP = {
    "norm2": "pre_ff_layernorm",
    "mlp": "feed_forward",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
}
_ATTENTION = Block(
    {
        "norm1": "input_layernorm",
        **ATTENTION_OF_LLAMA,
        **_MLP,
    }
)
_MAMBA = Block(
    {**mamba_2_modules("mamba", "input_layernorm"), **_MLP},
    activations=MAMBA_2,
    sizes=MAMBA_2_SIZES,
)
FAMILY = Family(
    "bamba",
    model_types=("bamba",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_ATTENTION, _MAMBA))},
)
