"""CLIP and SigLIP: a text tower and a vision tower of equal rank."""

from tracekit.architectures.schema import Family
from tracekit.architectures.shared import text_tower, vision_part

FAMILY = Family(
    "clip",
    model_types=("clip", "siglip"),
    modules={"vision_tower": "vision_model"},
    stacks={},
    parts=(text_tower("text_model"), vision_part("vision_model")),
    lacks=dict.fromkeys(
        ("logits", "resid_final", "final_norm_out"),
        "there are two towers, and no text is predicted: name text_layers[-1] or vision_layers[-1]",
    ),
)
