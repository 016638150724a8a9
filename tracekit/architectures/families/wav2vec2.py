"""wav2vec 2.0 and HuBERT: encoders of sound, with norms behind or, if stable, in front."""

from dataclasses import replace
from typing import Any

from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import NO_FINAL_NORM

_PREFIXES = ("wav2vec2", "hubert")
_BLOCK = Block(
    {
        "norm1": "layer_norm",
        "attn": "attention",
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.out_proj",
        "norm2": "final_layer_norm",
        "mlp": "feed_forward",
        "up": "feed_forward.intermediate_dense",
        "down": "feed_forward.output_dense",
    },
    residual=Residual.POST_NORM,
)
_NORM = tuple(f"{prefix}.encoder.layer_norm" for prefix in _PREFIXES)
_LAYERS = tuple(f"{prefix}.encoder.layers" for prefix in _PREFIXES)

_NO_TOKENS = {"embed_out": "there are no tokens: what the first layer reads is layers[0].resid_pre"}


def _is_post_norm(config: Any) -> bool:
    return not config.do_stable_layer_norm


_POST_NORM = Family(
    "wav2vec2",
    model_types=("wav2vec2", "hubert"),
    modules={"embed_norm": _NORM, "unembed": "lm_head"},
    stacks={"layers": Stack(_LAYERS, (_BLOCK,))},
    lacks={**NO_FINAL_NORM, **_NO_TOKENS},
)
_PRE_NORM = replace(
    _POST_NORM,
    modules={"final_norm": _NORM, "unembed": "lm_head"},
    stacks={"layers": Stack(_LAYERS, (replace(_BLOCK, residual=Residual.SEQUENTIAL),))},
    lacks=_NO_TOKENS,
)

FAMILY = replace(_POST_NORM, when=_is_post_norm, otherwise=_PRE_NORM)
