"""Mixtral, OLMoE, Qwen MoE: Llama with experts for an MLP, in all layers or in some."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import ROUTED, ROUTED_BEFORE_5
from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import MLP_OF_LLAMA, MODEL_OF_LLAMA

_ATTENTION = {
    "norm1": "input_layernorm",
    "attn": "self_attn",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
}
_SPARSE = Block(
    {
        **_ATTENTION,
        "mlp": ("mlp", "block_sparse_moe"),
        "router": ("mlp.gate", "block_sparse_moe.gate"),
        "experts": ("mlp.experts", "block_sparse_moe.experts"),
        "shared_expert": "mlp.shared_expert",
        "shared_expert_gate": "mlp.shared_expert_gate",
    },
    activations=ROUTED,
    when=has("mlp.experts"),
)
_SPARSE_BEFORE_5 = replace(_SPARSE, activations=ROUTED_BEFORE_5)
_DENSE = Block(
    {
        **_ATTENTION,
        **MLP_OF_LLAMA,
    },
    when=otherwise,
)
FAMILY = Family(
    "mixtral",
    model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                replace(_SPARSE_BEFORE_5, when=has("mlp.experts.0")),
                replace(_SPARSE_BEFORE_5, when=has("block_sparse_moe.experts.0")),
                _SPARSE,
                _DENSE,
            ),
        )
    },
)
