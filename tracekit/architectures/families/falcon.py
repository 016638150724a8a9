"""Falcon, in its variants: one sum or two, one norm or two, queries by groups or in front."""

from collections.abc import Callable

from tracekit.architectures.conditions import both, says
from tracekit.architectures.layouts import (
    GroupByGroup,
    HeadByHead,
    Layout,
    OneBehindTheOther,
)
from tracekit.architectures.schema import Block, Condition, Family, Lacks, Residual, Stack

_GROUPED = Lacks(
    "the queries of each group of heads lie beside its key and value: "
    "use attn_q, or the output of qkv"
)
_ONE_KEY = says(multi_query=True)


def _block(
    norms: dict[str, str],
    fused: Callable[[int], Layout],
    residual: Residual,
    *conditions: Condition,
) -> Block:
    modules = {
        **norms,
        "attn": "self_attention",
        "qkv": "self_attention.query_key_value",
        "o": "self_attention.dense",
        "mlp": "mlp",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    lacks = {"q": _GROUPED} if fused is GroupByGroup else {}
    return Block(modules, residual, fused, lacks, when=both(*conditions))


_SHARED = {"norm1": "input_layernorm"}
_BEFORE_BOTH = {"norm1": "ln_attn", "norm2": "ln_mlp"}
_ONE_BY_ONE = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_OLD = says(new_decoder_architecture=False)
_NEW = says(new_decoder_architecture=True)
_IN_PARALLEL = says(parallel_attn=True)
_PARALLEL, _SEQUENTIAL = Residual.PARALLEL, Residual.SEQUENTIAL
FAMILY = Family(
    "falcon",
    model_types=("falcon",),
    modules={
        "embed": "transformer.word_embeddings",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "transformer.h",
            (
                _block(
                    _BEFORE_BOTH, GroupByGroup, _PARALLEL, _NEW, says(num_ln_in_parallel_attn=2)
                ),
                _block(_SHARED, GroupByGroup, _PARALLEL, _NEW),
                _block(_SHARED, OneBehindTheOther, _PARALLEL, _OLD, _IN_PARALLEL, _ONE_KEY),
                _block(_SHARED, HeadByHead, _PARALLEL, _OLD, _IN_PARALLEL),
                _block(_ONE_BY_ONE, OneBehindTheOther, _SEQUENTIAL, _OLD, _ONE_KEY),
                _block(_ONE_BY_ONE, HeadByHead, _SEQUENTIAL, _OLD),
            ),
            sizes={"kv_heads": "num_kv_heads"},
        )
    },
)
