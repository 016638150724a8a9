"""Blocks, and reasons why a name is not there, that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Lacks, Residual, SubModel

# Of families whose attention is computed where no attention function can be put in its place.
OWN_ATTENTION: Final[Mapping[str, Lacks]] = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v", "scores", "pattern"),
    Lacks(
        "attention is computed in the forward of attn_core, and by no attention function of "
        "transformers: read it there, in attn_core.source"
    ),
)
# Of families whose attention calls a softmax itself: the pattern is met there, what made it is not.
OWN_SOFTMAX: Final[Mapping[str, Lacks]] = dict.fromkeys(
    ("attn_q", "attn_k", "attn_v"),
    Lacks(
        "attention is computed in the forward of attn_core, and given to no attention function: "
        "use scores, pattern and z, or read it in attn_core.source"
    ),
)
# Of families that end with the last layer, which is normed already.
NO_FINAL_NORM: Final[Mapping[str, str]] = dict.fromkeys(
    ("resid_final", "final_norm_out"),
    "there is no norm behind the last layer: it is layers[-1].resid_post",
)
# Of models that give one vector or one row of classes for a whole input.
NO_LOGITS: Final[Mapping[str, str]] = {
    "logits": "no token is predicted: what the classifier gives is in the model's output",
    "embed_out": "there are no tokens: the embedded patches are layers[0].resid_pre",
}

# -- text ---------------------------------------------------------------------------------------


def _attention(prefix: str, path: str, o: str = "out_proj") -> dict[str, str]:
    inside = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": o}
    return {f"{prefix}{word}": f"{path}.{name}" for word, name in inside.items()}


# What Llama has, and most that came after it: around its layers, and in each of them.
MODEL_OF_LLAMA: Final = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "unembed": "lm_head",
}
ATTENTION_OF_LLAMA: Final = {"attn": "self_attn", **_attention("", "self_attn", "o_proj")}
MLP_OF_LLAMA: Final = {
    "mlp": "mlp",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

BERT: Final = Block(
    {
        "attn": "attention",
        "attn_core": "attention.self",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "cross_attn": "crossattention",
        "cross_core": "crossattention.self",
        "cross_q": "crossattention.self.query",
        "cross_k": "crossattention.self.key",
        "cross_v": "crossattention.self.value",
        "cross_o": "crossattention.output.dense",
        "cross_norm": "crossattention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    },
    residual=Residual.POST_NORM,
)


def bart_like(residual: Residual, *, with_cross_attention: bool) -> tuple[Block, ...]:
    """The blocks of BART and of those that are written like it, with the norms behind or before."""
    own = {
        "norm1": "self_attn_layer_norm",
        "attn": "self_attn",
        **_attention("", "self_attn"),
        "norm2": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    }
    alone = Block(own, residual)
    if not with_cross_attention:
        return (alone,)
    cross = {"cross_norm": "encoder_attn_layer_norm", "cross_attn": "encoder_attn"}
    both = Block({**own, **cross, **_attention("cross_", "encoder_attn")}, residual, when=_crosses)
    return (both, alone)


# The number of heads of an encoder and of a decoder differ in name, so it is the module's.
HEADS_OF_MODULE: Final = {"heads": "num_heads", "kv_heads": "num_heads"}


def _crosses(module: nn.Module, config: Any) -> bool:
    """A decoder alone has the modules of cross-attention too, and does not call them."""
    return config.is_encoder_decoder or getattr(config, "add_cross_attention", False)


# -- vision and sound ---------------------------------------------------------------------------

CLIP: Final = Block(
    {
        "norm1": "layer_norm1",
        "attn": "self_attn",
        **_attention("", "self_attn"),
        "norm2": "layer_norm2",
        "mlp": "mlp",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
)
BLIP: Final = Block(
    {
        "norm1": "layer_norm1",
        "attn": "self_attn",
        "qkv": "self_attn.qkv",
        "o": "self_attn.projection",
        "norm2": "layer_norm2",
        "mlp": "mlp",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    fused=OneBehindTheOther,
)


def vit_like(norm1: str, norm2: str, **more: str) -> Block:
    """The block of ViT and of those written like it, in transformers 5 and in 4."""
    return Block(
        {
            "norm1": norm1,
            "attn": "attention",
            "attn_core": "attention.attention",
            "q": ("attention.q_proj", "attention.attention.query"),
            "k": ("attention.k_proj", "attention.attention.key"),
            "v": ("attention.v_proj", "attention.attention.value"),
            "o": ("attention.o_proj", "attention.output.dense"),
            "norm2": norm2,
            "mlp": "mlp",
            "up": ("mlp.fc1", "intermediate.dense"),
            "down": ("mlp.fc2", "output.dense"),
            **more,
        }
    )


# -- models inside models -----------------------------------------------------------------------


def vision_part(*paths: str) -> SubModel:
    """A vision tower, under names that leave room for those of a text model."""
    words = {
        "layers": "vision_layers",
        "patch_embed": "patch_embed",
        "embed_norm": "vision_embed_norm",
        "final_norm": "vision_norm",
    }
    return SubModel(paths, "vision_config", words)


def text_part(*paths: str) -> SubModel:
    """A text model of any family, which keeps its names."""
    return SubModel(paths, "text_config")


def text_tower(*paths: str) -> SubModel:
    """A text model of equal rank beside a vision tower."""
    words = {"layers": "text_layers", "final_norm": "text_norm"}
    return SubModel(paths, "text_config", {**words, "embed": "embed", "pos_embed": "pos_embed"})
