"""BERT and its heirs: encoders whose norms come behind attention and MLP."""

from tracekit.architectures.schema import Family, Stack
from tracekit.architectures.shared import BERT, NO_FINAL_NORM

_PREFIXES = ("bert", "roberta")

FAMILY = Family(
    "bert",
    model_types=("bert", "roberta", "camembert", "xlm-roberta"),
    modules={
        "embed": tuple(f"{prefix}.embeddings.word_embeddings" for prefix in _PREFIXES),
        "pos_embed": tuple(f"{prefix}.embeddings.position_embeddings" for prefix in _PREFIXES),
        "embed_norm": tuple(f"{prefix}.embeddings.LayerNorm" for prefix in _PREFIXES),
        "unembed_head": "cls.predictions.transform",
        "unembed": ("cls.predictions.decoder", "lm_head.decoder"),
    },
    stacks={"layers": Stack(tuple(f"{prefix}.encoder.layer" for prefix in _PREFIXES), (BERT,))},
    lacks=NO_FINAL_NORM,
)
