"""XGLM: BART's decoder alone, pre-norm, with an attention of its own over rows and heads in one."""

from dataclasses import replace

from tracekit.architectures.schema import Family, Residual, Stack
from tracekit.architectures.shared import OWN_ATTENTION, bart_like

_CROSSES, _ALONE = bart_like(Residual.SEQUENTIAL, with_cross_attention=True)
_OWN_CROSS_ATTENTION = {f"cross_{name}": reason for name, reason in OWN_ATTENTION.items()}

FAMILY = Family(
    "xglm",
    model_types=("xglm",),
    modules={
        "embed": "model.embed_tokens",
        "pos_embed": "model.embed_positions",
        "final_norm": "model.layer_norm",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "model.layers",
            (
                replace(_CROSSES, activations={**OWN_ATTENTION, **_OWN_CROSS_ATTENTION}),
                replace(_ALONE, activations=OWN_ATTENTION),
            ),
        )
    },
)
