"""The text towers of CLIP and SigLIP."""

from tracekit.architectures.schema import Family, Stack
from tracekit.architectures.shared import CLIP

FAMILY = Family(
    "clip_text",
    model_types=("clip_text_model", "siglip_text_model"),
    modules={
        "embed": ("text_model.embeddings.token_embedding", "embeddings.token_embedding"),
        "pos_embed": ("text_model.embeddings.position_embedding", "embeddings.position_embedding"),
        "final_norm": ("text_model.final_layer_norm", "final_layer_norm"),
    },
    stacks={"layers": Stack(("text_model.encoder.layers", "encoder.layers"), (CLIP,))},
    lacks={"logits": "no token is predicted: the vector of the text is in the model's output"},
)
