"""BLIP-2: a vision tower, a Q-Former that reads it, and any text model."""

from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import BLIP, text_part

_QFORMER = Block(
    {
        "attn": "attention",
        "attn_core": "attention.attention",
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "cross_attn": "crossattention",
        "cross_core": "crossattention.attention",
        "cross_q": "crossattention.attention.query",
        "cross_k": "crossattention.attention.key",
        "cross_v": "crossattention.attention.value",
        "cross_o": "crossattention.output.dense",
        "cross_norm": "crossattention.output.LayerNorm",
        "up": "intermediate_query.dense",
        "down": "output_query.dense",
        "norm2": "output_query.LayerNorm",
    },
    residual=Residual.POST_NORM,
)

FAMILY = Family(
    "blip_2",
    model_types=("blip-2",),
    modules={
        "vision_tower": "vision_model",
        "patch_embed": "vision_model.embeddings.patch_embedding",
        "vision_norm": "vision_model.post_layernorm",
        "projector": "language_projection",
    },
    stacks={
        "vision_layers": Stack("vision_model.encoder.layers", (BLIP,), config="vision_config"),
        "qformer_layers": Stack("qformer.encoder.layer", (_QFORMER,), config="qformer_config"),
    },
    parts=(text_part("language_model"),),
)
