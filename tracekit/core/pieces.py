"""The values inside an attention as modules: each an identity that the value passes through."""

# No module of the model refers to them. While a run has a hook on one, the call of the attention
# function is intercepted for that run, and the value goes through it (interleave/attend.py).

from __future__ import annotations

from typing import Any, final

from torch import nn

from tracekit.core.annex import PIECES


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
