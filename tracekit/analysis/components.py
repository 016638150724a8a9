"""A stack of parts of the residual stream, with their names; what all tools here hand back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tracekit.core.nest import on_one_device
from tracekit.errors import InputError
from tracekit.tracing.named_cache import NamedCache

# Which positions: one (its axis goes away), a stretch, or several; None: all.
Positions: TypeAlias = int | slice | list[int] | None


class Components(NamedTuple):
    """`values` is `[components, batch, pos, model]`, without the axes that were taken away.

    `labels` are theirs, in order: "embed", "0_attn_out", "L0H3".
    """

    values: Tensor
    labels: tuple[str, ...]

    def __repr__(self) -> str:
        shown = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
        return f"Components({list(self.values.shape)}: {shown})"


def stacked(parts: Iterable[tuple[str, Tensor]]) -> Components:
    """Parts with their labels, as a stack; those with fewer axes (a bias) are the same all over."""
    every = list(parts)
    if not every:
        raise InputError("there are no components: nothing of that kind is in front of that layer.")
    shape = torch.broadcast_shapes(*(value.shape for _, value in every))
    values = torch.stack(on_one_device(value.expand(shape) for _, value in every))
    return Components(values, tuple(label for label, _ in every))


def recorded(cache: NamedCache, name: str, layer: int) -> Tensor:
    """An activation of a layer, `[batch, pos, …]` also where the model folds these into one."""
    value = cache[name, layer]
    rows = cache["resid_pre", 0].shape[:-1]
    is_folded = value.shape[0] == rows.numel() and value.shape[: len(rows)] != rows
    return value.unflatten(0, tuple(rows)) if is_folded else value


def at_positions(value: Tensor, positions: Positions, axis: int = -2) -> Tensor:
    """`value` at some positions, which lie along `axis`, counted from the end."""
    if positions is None:
        return value
    behind = (slice(None),) * (-axis - 1)
    return value[(..., positions, *behind)]
