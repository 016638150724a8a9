"""DeBERTa: BERT's block, with attention to relative positions beside that to content."""

from dataclasses import replace
from typing import Any

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


def _has_no_convolution(config: Any) -> bool:
    return getattr(config, "conv_kernel_size", 0) == 0


_PLAIN = Family(
    "deberta",
    model_types=("deberta-v2", "deberta"),
    modules={
        "embed": "deberta.embeddings.word_embeddings",
        "embed_norm": "deberta.embeddings.LayerNorm",
        "unembed_head": "cls.predictions.transform",
        "unembed": "cls.predictions.decoder",
    },
    stacks={"layers": Stack("deberta.encoder.layer", (_SEPARATE, _FUSED))},
    lacks=NO_FINAL_NORM,
)
_WITH_CONVOLUTION = replace(
    _PLAIN,
    stacks={
        "layers": replace(
            _PLAIN.stacks["layers"], between="behind the first layer a convolution is added"
        )
    },
)

FAMILY = replace(_PLAIN, when=_has_no_convolution, otherwise=_WITH_CONVOLUTION)
