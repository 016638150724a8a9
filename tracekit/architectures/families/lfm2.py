"""LFM2: a gated short convolution or attention, then a gated MLP."""

from tracekit.architectures.layouts import Chunk
from tracekit.architectures.schema import Block, Family, Stack, output

_MLP = {
    "norm1": "operator_norm",
    "norm2": "ffn_norm",
    "mlp": "feed_forward",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
_ATTENTION = Block(
    {
        **_MLP,
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "o": "self_attn.out_proj",
    }
)
_CONVOLUTION = Block(
    {
        **_MLP,
        "conv": "conv",
        "in_proj": "conv.in_proj",
        "conv1d": "conv.conv",
        "out_proj": "conv.out_proj",
    },
    activations={
        "ssm_in_gate": output("in_proj", Chunk(0, 3), shape="batch pos inner"),
        "ssm_gate": output("in_proj", Chunk(1, 3)),
        "ssm_x": output("in_proj", Chunk(2, 3)),
    },
)
FAMILY = Family(
    "lfm2",
    model_types=("lfm2",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.embedding_norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_ATTENTION, _CONVOLUTION))},
)
