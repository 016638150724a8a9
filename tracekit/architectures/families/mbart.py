"""mBART and M2M-100: BART with the norms in front."""

from tracekit.architectures.schema import Family, Residual, Stack
from tracekit.architectures.shared import HEADS_OF_MODULE, bart_like

_PRE = Residual.SEQUENTIAL

FAMILY = Family(
    "mbart",
    model_types=("mbart", "m2m_100"),
    modules={
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "embed_norm": "model.decoder.layernorm_embedding",
        "final_norm": "model.decoder.layer_norm",
        "encoder": "model.encoder",
        "encoder_norm": "model.encoder.layer_norm",
        "unembed": "lm_head",
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
