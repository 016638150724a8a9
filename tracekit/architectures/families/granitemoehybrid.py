"""Granite 4: Mamba-2 or attention; experts and a shared MLP side by side, or that MLP alone."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.layouts import Chunk
from tracekit.architectures.mixers import (
    MAMBA_2,
    MAMBA_2_SIZES,
    ROUTED,
    ROUTED_BEFORE_5,
    mamba_2_modules,
)
from tracekit.architectures.schema import Block, Family, Lacks, Stack, output
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MODEL_OF_LLAMA

_SCALE = "residual_multiplier"
_ATTENTION = Block(
    {
        "norm1": "input_layernorm",
        **ATTENTION_OF_LLAMA,
    },
    scale=_SCALE,
    when=has("self_attn"),
)
_MAMBA = Block(
    mamba_2_modules("mamba", "input_layernorm"),
    activations=MAMBA_2,
    scale=_SCALE,
    sizes=MAMBA_2_SIZES,
    when=has("mamba"),
)
_MLP = {
    "norm2": "post_attention_layernorm",
    "gate_up": "shared_mlp.input_linear",
    "down": "shared_mlp.output_linear",
}
_DENSE = Block({**_MLP, "mlp": "shared_mlp"}, when=otherwise)
_SPARSE = Block(
    {
        **_MLP,
        "mlp": "block_sparse_moe",
        "router": "block_sparse_moe.router",
        "experts": "block_sparse_moe.experts",
        "shared_expert": "shared_mlp",
    },
    activations={
        **ROUTED,
        "mlp_pre": output("gate_up", Chunk(0)),  # of the shared MLP
        "mlp_out": Lacks("no module adds them up: it is experts_out + shared_expert_out"),
    },
    added_last=("experts_out", "shared_expert_out"),
    when=has("block_sparse_moe"),
)
_SPARSE_BEFORE_5 = replace(
    _SPARSE,
    activations={
        **_SPARSE.activations,
        **ROUTED_BEFORE_5,
        "router_logits": output("router", inside="layer"),
        "experts_out": output("mlp", shape="batch pos model"),
    },
    when=has("block_sparse_moe.router.layer"),
)
FAMILY = Family(
    "granitemoehybrid",
    model_types=("granitemoehybrid",),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            tuple(
                mixer & mlp
                for mixer in (_ATTENTION, _MAMBA)
                for mlp in (_SPARSE_BEFORE_5, _SPARSE, _DENSE)
            ),
        )
    },
)
