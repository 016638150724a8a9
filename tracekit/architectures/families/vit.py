"""ViT and DeiT, and AST, which reads a spectrogram as a picture."""

from tracekit.architectures.schema import Family, Stack
from tracekit.architectures.shared import NO_LOGITS, vit_like

_PREFIXES = ("vit", "deit", "audio_spectrogram_transformer")

FAMILY = Family(
    "vit",
    model_types=("vit", "deit", "audio-spectrogram-transformer"),
    modules={
        "patch_embed": tuple(f"{prefix}.embeddings.patch_embeddings" for prefix in _PREFIXES),
        "final_norm": tuple(f"{prefix}.layernorm" for prefix in _PREFIXES),
    },
    stacks={
        "layers": Stack(
            tuple(
                f"{prefix}.{path}" for prefix in _PREFIXES for path in ("layers", "encoder.layer")
            ),
            (vit_like("layernorm_before", "layernorm_after"),),
        )
    },
    lacks=NO_LOGITS,
)
