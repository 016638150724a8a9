"""BLOOM: attention and MLP add the residual stream themselves, so their last maps count."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.layouts import HeadByHead
from tracekit.architectures.schema import Block, Family, Residual, Stack, output
from tracekit.architectures.shared import OWN_SOFTMAX

_PRE_NORM = Block(
    {
        "norm1": "input_layernorm",
        "attn": "self_attention",
        "qkv": "self_attention.query_key_value",
        "o": "self_attention.dense",
        "norm2": "post_attention_layernorm",
        "mlp": "mlp",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    fused=HeadByHead,
    activations={**OWN_SOFTMAX, "attn_out": output("o"), "mlp_out": output("down")},
    when=says(apply_residual_connection_post_layernorm=False),
)
# What is added to are the norms: attn_out to what norm1 gives, mlp_out to what norm2 gives.
_OVER_NORMS = replace(
    _PRE_NORM,
    residual=Residual.OTHER,
    activations={**_PRE_NORM.activations, "resid_mid": output("attn")},
    when=otherwise,
)
FAMILY = Family(
    "bloom",
    model_types=("bloom",),
    modules={
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("transformer.h", (_PRE_NORM, _OVER_NORMS))},
)
