"""The values inside an attention, as paths: `model.transformer.h.3.attn.attention.pattern`."""

# They stand beside the model, behind the path of the attention that they belong to; core/pieces.py
# has what is there.

from __future__ import annotations

from typing import Final

ANNEX: Final = "attention"
PIECES: Final = ("q", "k", "v", "scores", "pattern", "z")  # in the order in which they are computed


# Values inside other modules, each at a path behind its module's: layers.3.ln_1.norm_scale.
INNER: Final = ("norm_scale", "norm_normalized", "head_result")


def axis_of_positions(path: str, dims: int) -> int | None:
    """The axis of the positions (the queries, where there are keys as well) in a value at `path`.

    None where that is not known: it is no value of an attention.
    """
    if dims != 4 or path.rpartition(".")[2] not in PIECES or owner_of(path) is None:
        return None
    return 1 if path.endswith(".z") else 2


def inner_owner_of(path: str) -> str | None:
    """The norm, or output projection, that a path is a value inside of; None for others."""
    above, _, last = path.rpartition(".")
    return above if last in INNER and above else None


def owner_of(path: str) -> str | None:
    """The attention that a path of an annex, or of a piece in one, belongs to; None for others."""
    above, _, last = path.rpartition(".")
    if last in PIECES:
        above, _, last = above.rpartition(".")
    return above if last == ANNEX and above else None
