"""Pegasus and Blenderbot: mBART, with embeddings of positions that are the same for every row."""

from dataclasses import replace

from tracekit.architectures.families.mbart import FAMILY as MBART
from tracekit.architectures.schema import output

FAMILY = replace(
    MBART,
    name="pegasus",
    model_types=("pegasus", "blenderbot"),
    activations={"pos_embed_out": output("pos_embed", shape="pos model")},
)
