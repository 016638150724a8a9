"""Qwen2-Audio: Whisper's encoder, a projector, and a text model."""

from tracekit.architectures.layouts import Rows
from tracekit.architectures.schema import Family, Lacks, Residual, Stack, output
from tracekit.architectures.shared import HEADS_OF_MODULE, bart_like, text_part

FAMILY = Family(
    "qwen2_audio",
    model_types=("qwen2_audio",),
    modules={
        "audio_tower": "model.audio_tower",
        "audio_norm": "model.audio_tower.layer_norm",
        "projector": "model.multi_modal_projector",
        "unembed": "lm_head",
    },
    stacks={
        "audio_layers": Stack(
            "model.audio_tower.layers",
            bart_like(Residual.SEQUENTIAL, with_cross_attention=False),
            config="audio_config",
            behind="frames are averaged two by two",
            sizes=HEADS_OF_MODULE,
        )
    },
    activations={
        "audio_features": output("projector", Rows()),
        "image_features": Lacks("it hears, and sees no images: name audio_features"),
    },
    parts=(text_part("model.language_model"),),
)
