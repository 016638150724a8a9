"""DistilBERT: BERT's order, with the norms in the block."""

from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import NO_FINAL_NORM

FAMILY = Family(
    "distilbert",
    model_types=("distilbert",),
    modules={
        "embed": "distilbert.embeddings.word_embeddings",
        "pos_embed": "distilbert.embeddings.position_embeddings",
        "embed_norm": "distilbert.embeddings.LayerNorm",
        "unembed": "vocab_projector",
    },
    stacks={
        "layers": Stack(
            "distilbert.transformer.layer",
            (
                Block(
                    {
                        "attn": "attention",
                        "q": "attention.q_lin",
                        "k": "attention.k_lin",
                        "v": "attention.v_lin",
                        "o": "attention.out_lin",
                        "norm1": "sa_layer_norm",
                        "mlp": "ffn",
                        "up": "ffn.lin1",
                        "down": "ffn.lin2",
                        "norm2": "output_layer_norm",
                    },
                    residual=Residual.POST_NORM,
                ),
            ),
        )
    },
    lacks=NO_FINAL_NORM,
)
