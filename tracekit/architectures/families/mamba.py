"""Mamba and Falcon-Mamba: layers of one state-space mixer alone."""

from tracekit.architectures.mixers import MAMBA_1, MAMBA_1_SIZES, mamba_1_modules
from tracekit.architectures.schema import Block, Family, Residual, Stack

FAMILY = Family(
    "mamba",
    model_types=("mamba", "falcon_mamba"),
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
                    mamba_1_modules("mixer", "norm"),
                    residual=Residual.SINGLE,
                    activations=MAMBA_1,
                    sizes=MAMBA_1_SIZES,
                ),
            ),
        )
    },
)
