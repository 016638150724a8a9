"""DINOv2: ViT with a scale on what attention and MLP add."""

from dataclasses import replace
from typing import Any

from torch import nn

from tracekit.architectures.schema import Family, Stack
from tracekit.architectures.shared import NO_LOGITS, vit_like

_PREFIXES = ("dinov2", "dinov2_with_registers")


def _is_gated(module: nn.Module, config: Any) -> bool:
    return config.use_swiglu_ffn and hasattr(module.mlp, "gate_proj")


def _is_gated_in_one(module: nn.Module, config: Any) -> bool:
    """As in transformers 4."""
    return config.use_swiglu_ffn and hasattr(module.mlp, "weights_in")


def _is_plain(module: nn.Module, config: Any) -> bool:
    return not config.use_swiglu_ffn


_PLAIN = replace(
    vit_like("norm1", "norm2", attn_scale="layer_scale1", mlp_scale="layer_scale2"),
    when=_is_plain,
)
_GATED = replace(
    _PLAIN,
    modules={
        **_PLAIN.modules,
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    when=_is_gated,
)
_GATED_IN_ONE = replace(
    _PLAIN,
    modules={**_PLAIN.modules, "gate_up": "mlp.weights_in", "down": "mlp.weights_out"},
    when=_is_gated_in_one,
)

FAMILY = Family(
    "dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    modules={
        "patch_embed": tuple(f"{prefix}.embeddings.patch_embeddings" for prefix in _PREFIXES),
        "final_norm": tuple(f"{prefix}.layernorm" for prefix in _PREFIXES),
    },
    stacks={
        "layers": Stack(
            tuple(f"{prefix}.encoder.layer" for prefix in _PREFIXES),
            (_PLAIN, _GATED, _GATED_IN_ONE),
        )
    },
    lacks=NO_LOGITS,
)
