"""Granite MoE: Granite with experts for an MLP."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import ROUTED, ROUTED_BEFORE_5
from tracekit.architectures.schema import Block, Family, Stack, output
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MODEL_OF_LLAMA

_BLOCK = Block(
    {
        "norm1": "input_layernorm",
        **ATTENTION_OF_LLAMA,
        "norm2": "post_attention_layernorm",
        "mlp": "block_sparse_moe",
        "router": "block_sparse_moe.router",
        "experts": "block_sparse_moe.experts",
    },
    activations=ROUTED,
    scale="residual_multiplier",
    when=otherwise,
)
_BEFORE_5 = replace(
    _BLOCK,
    activations={**ROUTED_BEFORE_5, "router_logits": output("router", inside="layer")},
    when=has("block_sparse_moe.router.layer"),
)
FAMILY = Family(
    "granitemoe",
    model_types=("granitemoe",),
    modules=MODEL_OF_LLAMA,
    stacks={"layers": Stack("model.layers", (_BEFORE_5, _BLOCK))},
)
