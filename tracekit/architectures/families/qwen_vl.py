"""Qwen-VL: patches of all images in one row of a vision tower, merged for the text model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Declared, Family, Lacks, Stack, output
from tracekit.architectures.shared import text_part

# Attention is called for one image (or window) after the other.
_IN_TURN: Mapping[str, Declared] = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v", "scores", "pattern"),
    Lacks(
        "attention is called for one image, or window, after the other: name q, k, v or z, of all"
    ),
)
_BLOCK = {
    "norm1": "norm1",
    "attn": "attn",
    "qkv": "attn.qkv",
    "o": "attn.proj",
    "norm2": "norm2",
    "mlp": "mlp",
}
_MLPS = (
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    {"up": "mlp.linear_fc1", "down": "mlp.linear_fc2"},
    {"up": "mlp.fc1", "down": "mlp.fc2"},
)

_GIVES_TWO = Family(
    "qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    modules={
        "vision_tower": "model.visual",
        "patch_embed": "model.visual.patch_embed",
        "projector": "model.visual.merger",
        "unembed": "lm_head",
    },
    stacks={
        "vision_layers": Stack(
            "model.visual.blocks",
            tuple(
                Block(
                    {**_BLOCK, **mlp},
                    fused=OneBehindTheOther,
                    activations=_IN_TURN,
                    axes={"batch pos": "batch*pos"},
                )
                for mlp in _MLPS
            ),
            config="vision_config",
        )
    },
    # In windows, the second generation's merger gives the patches in another order than the text
    # model is given them; the second tensor of the tower has them in that of the text.
    activations={"image_features": output("vision_tower", key=1)},
    parts=(text_part("model.language_model"),),
)

# In transformers 4 the tower's configuration has no name of its own, and the tower gives the
# features first.
_GIVES_FEATURES_FIRST = replace(_GIVES_TWO, activations={"image_features": output("vision_tower")})


def _is_named(config: Any) -> bool:
    return config.vision_config.model_type != config.model_type


FAMILY = replace(_GIVES_TWO, when=_is_named, otherwise=_GIVES_FEATURES_FIRST)
