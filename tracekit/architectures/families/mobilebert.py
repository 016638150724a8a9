"""MobileBERT: each block works in a narrow stream of its own, and adds what becomes of it."""

from dataclasses import replace
from typing import Any

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.schema import Block, Family, Lacks, Point, Residual, Stack, output
from tracekit.architectures.shared import BERT, NO_FINAL_NORM
from tracekit.core.site import Slot

_GIVEN_APART = Lacks(
    "attention is given three tensors, for queries, keys and values: write q, k and v for it alone"
)
_NARROW_MID = Lacks(
    "within a block there is a narrow stream alone, that starts anew in each block: use what "
    "norm1 gives"
)
_ADDED_TO_NARROW = Lacks(
    "attention and MLPs add to the narrow stream of the block: use what their projections give "
    "(o; ffn.*.output.dense and output.dense), or output.bottleneck.dense for the block as a whole"
)
_SEVERAL_MLPS = Lacks(
    "a block has MLPs one behind the other: take ffn.*.intermediate.dense and ffn.*.output.dense, "
    "and of the last intermediate.dense and output.dense"
)
_MLP = dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post"), _SEVERAL_MLPS)
_ATTENTION = {
    word: path
    for word, path in BERT.modules.items()
    if word not in ("up", "down", "norm2") and not word.startswith("cross_")
}
_BOTTLENECK = Block(
    _ATTENTION,
    residual=Residual.OTHER,
    activations={
        **_MLP,
        "attn_in": _GIVEN_APART,
        "resid_mid": _NARROW_MID,
        "attn_out": _ADDED_TO_NARROW,
        "mlp_out": _ADDED_TO_NARROW,
        "head_result": Point(
            "o", Slot.OUTPUT, inside="head_result", shape="batch pos heads bottleneck"
        ),
    },
)
_ONE_MLP = replace(
    BERT, activations={"attn_in": _GIVEN_APART}, when=says(num_feedforward_networks=1)
)
_MORE_MLPS = Block(
    _ATTENTION,
    residual=Residual.OTHER,
    activations={
        **_MLP,
        "attn_in": _GIVEN_APART,
        "resid_mid": output("norm1"),
        "attn_out": output("o"),
        "mlp_out": _SEVERAL_MLPS,
    },
    when=otherwise,
)


def _has_no_bottleneck(config: Any) -> bool:
    return not config.use_bottleneck


_LACKS = {
    **NO_FINAL_NORM,
    **dict.fromkeys(
        ("W_U", "b_U"),
        "no module makes the logits: they are the product with decoder.weight beside dense.weight, "
        "plus decoder.bias, all in cls.predictions",
    ),
}
_WIDE = Family(
    "mobilebert",
    model_types=("mobilebert",),
    modules={
        "embed": "mobilebert.embeddings.word_embeddings",
        "pos_embed": "mobilebert.embeddings.position_embeddings",
        "embed_norm": "mobilebert.embeddings.LayerNorm",
        "unembed_head": "cls.predictions.transform",
    },
    stacks={"layers": Stack("mobilebert.encoder.layer", (_ONE_MLP, _MORE_MLPS))},
    activations={
        "embed_out": output("embed", shape="batch pos embedding"),
        "logits": output("", inside="cls.predictions"),
    },
    lacks=_LACKS,
    when=_has_no_bottleneck,
)
FAMILY = replace(
    _WIDE,
    stacks={"layers": Stack("mobilebert.encoder.layer", (_BOTTLENECK,))},
    lacks={
        **_LACKS,
        **dict.fromkeys(
            ("W_Q", "W_K", "W_V", "W_O", "b_O", "QK", "OV"),
            "attention reads and writes the narrow stream of its block, and not the residual "
            "stream: use the weights of q, k, v and o",
        ),
    },
    when=lambda config: config.use_bottleneck,
    otherwise=_WIDE,
)
