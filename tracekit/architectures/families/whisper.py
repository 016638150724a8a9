"""Whisper: an encoder of sound and a decoder of text, pre-norm."""

from tracekit.architectures.schema import Family, Residual, Stack
from tracekit.architectures.shared import HEADS_OF_MODULE, bart_like

_PRE = Residual.SEQUENTIAL

FAMILY = Family(
    "whisper",
    model_types=("whisper",),
    modules={
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "final_norm": "model.decoder.layer_norm",
        "encoder": "model.encoder",
        "encoder_norm": "model.encoder.layer_norm",
        "unembed": "proj_out",
    },
    stacks={
        "layers": Stack(
            "model.decoder.layers",
            bart_like(_PRE, with_cross_attention=True),
            sizes=HEADS_OF_MODULE,
        ),
        "encoder_layers": Stack(
            "model.encoder.layers",
            bart_like(_PRE, with_cross_attention=False),
            sizes=HEADS_OF_MODULE,
        ),
    },
)
