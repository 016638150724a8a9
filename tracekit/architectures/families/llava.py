"""LLaVA and others of its plan: a vision tower, a projector, and any text model."""

from tracekit.architectures.schema import Family
from tracekit.architectures.shared import text_part, vision_part

FAMILY = Family(
    "llava",
    model_types=("llava", "paligemma", "gemma3", "idefics3", "smolvlm"),
    modules={
        "vision_tower": ("model.vision_tower", "model.vision_model"),
        "projector": ("model.multi_modal_projector", "model.connector"),
        "unembed": "lm_head",
    },
    stacks={},
    parts=(
        text_part("model.language_model", "model.text_model"),
        vision_part("model.vision_tower", "model.vision_model"),
    ),
)
