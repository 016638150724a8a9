"""The values inside an attention as modules: each an identity that the value passes through."""

# They stand beside the model, at paths behind that of the attention they belong to:
#
#     model.transformer.h.3.attn.attention.pattern
#
# No module of the model refers to them. While a run has a hook on one, the call of the attention
# function is intercepted for that run, and the value goes through it (interleave/attend.py).

from __future__ import annotations

from typing import Any, Final, final

from torch import nn

ANNEX: Final = "attention"
PIECES: Final = ("q", "k", "v", "scores", "pattern", "z")  # in the order in which they are computed


# Values inside other modules, each at a path behind its module's: layers.3.ln_1.norm_scale.
INNER: Final = ("norm_scale", "norm_normalized", "head_result")


@final
class Piece(nn.Module):
    """One value of the attention, or of another module, at the path `owner`."""

    def __init__(self, owner: str, name: str, heads: int = 0) -> None:
        super().__init__()
        self.owner = owner
        self.name = name
        self.heads = heads  # of the attention, where an output projection divides by them

    def forward(self, value: Any) -> Any:
        """The value itself."""
        return value

    def extra_repr(self) -> str:
        """What is printed of it."""
        return self.name


@final
class Annex(nn.Module):
    """All values of the attention at the path `owner`; never called itself."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        for name in PIECES:
            self.add_module(name, Piece(owner, name))


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
