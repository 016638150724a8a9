"""Marian: BART, with embeddings of positions that are the same for every row."""

from dataclasses import replace

from tracekit.architectures.families.bart import FAMILY as BART
from tracekit.architectures.schema import output

FAMILY = replace(
    BART,
    name="marian",
    model_types=("marian", "blenderbot-small"),
    activations={"pos_embed_out": output("pos_embed", shape="pos model")},
)
