"""T5: sublayers in a list, and relative positions that the first layer of a stack computes."""

from typing import Any

from torch import nn

from tracekit.architectures.schema import Block, Family, Stack


def _is_gated(module: nn.Module, config: Any) -> bool:
    return config.is_gated_act


def _is_plain(module: nn.Module, config: Any) -> bool:
    return not config.is_gated_act


_ATTENTION = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "o": "layer.0.SelfAttention.o",
    "rel_pos": "layer.0.SelfAttention.relative_attention_bias",
}
_CROSS_ATTENTION = {
    "cross_norm": "layer.1.layer_norm",
    "cross_attn": "layer.1.EncDecAttention",
    "cross_q": "layer.1.EncDecAttention.q",
    "cross_k": "layer.1.EncDecAttention.k",
    "cross_v": "layer.1.EncDecAttention.v",
    "cross_o": "layer.1.EncDecAttention.o",
}


def _blocks(attention: dict[str, str], last: int) -> tuple[Block, ...]:
    """With a plain MLP as sublayer `last`, and with a gated one."""
    inside = f"layer.{last}.DenseReluDense"
    mlp = {"norm2": f"layer.{last}.layer_norm", "mlp": inside, "down": f"{inside}.wo"}
    plain = {**attention, **mlp, "up": f"{inside}.wi"}
    gated = {**attention, **mlp, "gate": f"{inside}.wi_0", "up": f"{inside}.wi_1"}
    return (Block(plain, when=_is_plain), Block(gated, when=_is_gated))


FAMILY = Family(
    "t5",
    model_types=("t5", "mt5", "umt5"),
    modules={
        "embed": "decoder.embed_tokens",
        "final_norm": "decoder.final_layer_norm",
        "encoder": "encoder",
        "encoder_norm": "encoder.final_layer_norm",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack("decoder.block", _blocks({**_ATTENTION, **_CROSS_ATTENTION}, 2)),
        "encoder_layers": Stack("encoder.block", _blocks(_ATTENTION, 1)),
    },
)
