"""ALBERT: one layer, or a few, called over and over; narrow embeddings."""

from tracekit.architectures.schema import Block, Family, Lacks, Residual, Stack, output
from tracekit.architectures.shared import NO_FINAL_NORM

_NARROW = "batch pos embedding"

FAMILY = Family(
    "albert",
    model_types=("albert",),
    modules={
        "embed": "albert.embeddings.word_embeddings",
        "pos_embed": "albert.embeddings.position_embeddings",
        "embed_norm": "albert.embeddings.LayerNorm",
        "unembed": "predictions.decoder",
    },
    stacks={
        "layers": Stack(
            "albert.encoder.albert_layer_groups.*.albert_layers.*",
            (
                Block(
                    {
                        "attn": "attention",
                        "q": "attention.query",
                        "k": "attention.key",
                        "v": "attention.value",
                        "o": "attention.dense",
                        "norm1": "attention.LayerNorm",
                        "up": "ffn",
                        "down": "ffn_output",
                        "norm2": "full_layer_layer_norm",
                    },
                    residual=Residual.POST_NORM,
                    activations={
                        "attn_in": Lacks(
                            "the attention module adds to the residual stream too: write q, k "
                            "and v for attention alone, or resid_pre for both"
                        )
                    },
                ),
            ),
            repeats="num_hidden_layers",
        )
    },
    activations={
        "embed_out": output("embed", shape=_NARROW),
        "pos_embed_out": output("pos_embed", shape=f"1|{_NARROW}"),
    },
    lacks=NO_FINAL_NORM,
)
