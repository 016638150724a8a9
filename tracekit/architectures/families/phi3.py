"""Phi-3: Llama with queries, keys and values in one, and gate and up in one, gate first."""

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Stack, output
from tracekit.architectures.shared import MODEL_OF_LLAMA

FAMILY = Family(
    "phi3",
    model_types=("phi3",),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "input_layernorm",
                        "attn": "self_attn",
                        "qkv": "self_attn.qkv_proj",
                        "o": "self_attn.o_proj",
                        "norm2": "post_attention_layernorm",
                        "mlp": "mlp",
                        "gate_up": "mlp.gate_up_proj",
                        "down": "mlp.down_proj",
                    },
                    fused=OneBehindTheOther,
                    activations={
                        "attn_out": output("", inside="resid_attn_dropout"),
                        "mlp_out": output("", inside="resid_mlp_dropout"),
                    },
                ),
            ),
        )
    },
)
