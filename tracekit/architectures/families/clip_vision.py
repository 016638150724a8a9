"""The vision tower of CLIP, which norms the class token alone behind its last layer."""

from tracekit.architectures.schema import Family, Stack, given, output
from tracekit.architectures.shared import CLIP, NO_LOGITS

FAMILY = Family(
    "clip_vision",
    model_types=("clip_vision_model",),
    modules={
        "patch_embed": ("vision_model.embeddings.patch_embedding", "embeddings.patch_embedding"),
        "embed_norm": ("vision_model.pre_layrnorm", "pre_layrnorm"),
        "final_norm": ("vision_model.post_layernorm", "post_layernorm"),
    },
    stacks={
        "layers": Stack(
            ("vision_model.encoder.layers", "encoder.layers"),
            (CLIP,),
            behind="the norm is given the class token alone",
        )
    },
    activations={
        "resid_final": given("final_norm", shape="batch model"),
        "final_norm_out": output("final_norm", shape="batch model"),
    },
    lacks=NO_LOGITS,
)
