"""ELECTRA: BERT, with embeddings that may be narrower than the residual stream."""

from tracekit.architectures.schema import Family, Stack, output
from tracekit.architectures.shared import BERT, NO_FINAL_NORM

_NARROW = "batch pos embedding"

FAMILY = Family(
    "electra",
    model_types=("electra",),
    modules={
        "embed": "electra.embeddings.word_embeddings",
        "pos_embed": "electra.embeddings.position_embeddings",
        "embed_norm": "electra.embeddings.LayerNorm",
        "unembed_head": "generator_predictions",
        "unembed": "generator_lm_head",
    },
    stacks={"layers": Stack("electra.encoder.layer", (BERT,))},
    activations={
        "embed_out": output("embed", shape=_NARROW),
        "pos_embed_out": output("pos_embed", shape=f"1|{_NARROW}"),
    },
    lacks=NO_FINAL_NORM,
)
