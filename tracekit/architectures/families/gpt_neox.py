"""GPT-NeoX and Pythia: attention and MLP in one sum, or one behind the other; each has its norm."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.layouts import HeadByHead
from tracekit.architectures.schema import Block, Family, Residual, Stack, output

_PARALLEL = Block(
    {
        "norm1": "input_layernorm",
        "attn": "attention",
        "qkv": "attention.query_key_value",
        "o": "attention.dense",
        "norm2": "post_attention_layernorm",
        "mlp": "mlp",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    residual=Residual.PARALLEL,
    fused=HeadByHead,
    activations={
        "attn_out": output("", inside="post_attention_dropout"),
        "mlp_out": output("", inside="post_mlp_dropout"),
    },
    when=says(use_parallel_residual=True),
)
FAMILY = Family(
    "gpt_neox",
    model_types=("gpt_neox",),
    modules={
        "embed": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "unembed": ("lm_head", "embed_out"),
    },
    stacks={
        "layers": Stack(
            "gpt_neox.layers",
            (_PARALLEL, replace(_PARALLEL, residual=Residual.SEQUENTIAL, when=otherwise)),
        )
    },
)
