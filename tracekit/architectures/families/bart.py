"""BART: an encoder and a decoder whose norms come behind what they norm."""

from tracekit.architectures.schema import Family, Residual, Stack
from tracekit.architectures.shared import HEADS_OF_MODULE, NO_FINAL_NORM, bart_like

_POST = Residual.POST_NORM

FAMILY = Family(
    "bart",
    model_types=("bart", "plbart"),
    modules={
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "embed_norm": "model.decoder.layernorm_embedding",
        "encoder": "model.encoder",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "model.decoder.layers",
            bart_like(_POST, with_cross_attention=True),
            sizes=HEADS_OF_MODULE,
        ),
        "encoder_layers": Stack(
            "model.encoder.layers",
            bart_like(_POST, with_cross_attention=False),
            sizes=HEADS_OF_MODULE,
        ),
    },
    lacks=NO_FINAL_NORM,
)
