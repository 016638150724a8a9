"""DeBERTa: BERT's block, with attention to relative positions beside that to content."""

from dataclasses import replace

from tracekit.architectures.layouts import HeadByHead
from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import NO_FINAL_NORM, OWN_ATTENTION

_BLOCK = {
    "attn": "attention",
    "attn_core": "attention.self",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_SEPARATE = Block(
    {
        **_BLOCK,
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
    },
    residual=Residual.POST_NORM,
    activations=OWN_ATTENTION,
)
# The first version: its biases of queries and values are added to what is named q and v.
_FUSED = replace(_SEPARATE, modules={**_BLOCK, "qkv": "attention.self.in_proj"}, fused=HeadByHead)

FAMILY = Family(
    "deberta",
    model_types=("deberta-v2", "deberta"),
    modules={
        "embed": "deberta.embeddings.word_embeddings",
        "embed_norm": "deberta.embeddings.LayerNorm",
        "unembed": "cls.predictions.decoder",
    },
    stacks={"layers": Stack("deberta.encoder.layer", (_SEPARATE, _FUSED))},
    lacks=NO_FINAL_NORM,
)
