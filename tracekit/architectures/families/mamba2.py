"""Mamba-2: layers of one state-space mixer alone, all of it from one projection."""

from tracekit.architectures.mixers import MAMBA_2, MAMBA_2_SIZES, mamba_2_modules
from tracekit.architectures.schema import Block, Family, Residual, Stack

FAMILY = Family(
    "mamba2",
    model_types=("mamba2",),
    modules={
        "embed": "backbone.embeddings",
        "final_norm": "backbone.norm_f",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "backbone.layers",
            (
                Block(
                    mamba_2_modules("mixer", "norm"),
                    residual=Residual.SINGLE,
                    activations=MAMBA_2,
                    sizes=MAMBA_2_SIZES,
                ),
            ),
        )
    },
)
