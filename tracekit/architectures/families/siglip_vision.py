"""The vision towers of SigLIP and of those that took it over."""

from tracekit.architectures.schema import Family, Stack
from tracekit.architectures.shared import CLIP, NO_LOGITS

FAMILY = Family(
    "siglip_vision",
    model_types=("siglip_vision_model", "idefics3_vision", "idefics2_vision", "smolvlm_vision"),
    modules={
        "patch_embed": ("vision_model.embeddings.patch_embedding", "embeddings.patch_embedding"),
        "final_norm": ("vision_model.post_layernorm", "post_layernorm"),
    },
    stacks={"layers": Stack(("vision_model.encoder.layers", "encoder.layers"), (CLIP,))},
    lacks=NO_LOGITS,
)
