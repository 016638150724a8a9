"""ModernBERT: a pre-norm encoder with rotary positions and a gated MLP, both fused."""

from tracekit.architectures.layouts import OneBehindTheOther
from tracekit.architectures.schema import Block, Family, Stack

FAMILY = Family(
    "modernbert",
    model_types=("modernbert",),
    modules={
        "embed": "model.embeddings.tok_embeddings",
        "embed_norm": "model.embeddings.norm",
        "final_norm": "model.final_norm",
        "unembed_head": "head",
        "unembed": "decoder",
    },
    stacks={
        "layers": Stack(
            "model.layers",
            (
                Block(
                    {
                        "norm1": "attn_norm",
                        "attn": "attn",
                        "qkv": "attn.Wqkv",
                        "o": "attn.Wo",
                        "norm2": "mlp_norm",
                        "mlp": "mlp",
                        "gate_up": "mlp.Wi",
                        "down": "mlp.Wo",
                    },
                    fused=OneBehindTheOther,
                ),
            ),
        )
    },
)
