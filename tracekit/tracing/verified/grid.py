"""Where the rows and the positions of a run lie in a value, and which tokens they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from tracekit.core.nest import first_tensor
from tracekit.interleave.duties import Span
from tracekit.tracing.timeline import PADDING, own_positions

# From token ids, the text of each.
Tell = Callable[[Sequence[int]], Sequence[str]]

_IDS = (
    ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask"),
    ("input_ids", "inputs_embeds", "attention_mask"),
)


@dataclass(frozen=True)
class Sequences:
    """What one model reads: `own` is `[rows, length]`, each token's place in its row."""

    own: Tensor
    ids: Tensor | None  # `[rows, length]`

    @property
    def length(self) -> int:
        """How many columns."""
        return self.own.shape[1]


@final
class Grid:
    """The rows of a batch, and the positions of each."""

    def __init__(self, rows: int, sequences: Sequence[Sequences]) -> None:
        self.rows = rows
        self.sequences = tuple(sequences)  # the decoder's first

    @classmethod
    def of(cls, module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Grid:
        """That of a call of a whole model."""
        given = _by_name(module, *inputs)
        found: list[Sequences] = []
        for ids, embeds, mask in _IDS:
            tensor = given.get(ids)
            tensor = given.get(embeds) if tensor is None else tensor
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                found.append(_sequences(tensor, given.get(mask)))
        if found:
            return cls(found[0].own.shape[0], found)
        first = first_tensor(inputs)
        if first is None or not first.dim():
            return cls(1, ())
        is_long = first.dim() == 3 or (first.dim() == 2 and not first.is_floating_point())
        return cls(first.shape[0], [_sequences(first, None)] if is_long else ())

    def tokens(self, tell: Tell | None) -> tuple[tuple[str, ...], ...]:
        """Of each row, the text of its tokens, padding left out."""
        if not self.sequences:
            return ()
        own, ids = self.sequences[0].own, self.sequences[0].ids
        if ids is None:
            return tuple(tuple("" for _ in row[row != PADDING]) for row in own)
        real = [row[places != PADDING].tolist() for row, places in zip(ids, own, strict=True)]
        return tuple(tuple(map(str, row if tell is None else tell(row))) for row in real)

    def spread(self, mask: Tensor, span: Span | None) -> Tensor | None:
        """`[rows, positions]`, or `[rows, 1]`: where something is true in a value, for the rows.

        None where the value has no axis of rows that could be told.
        """
        count = self.rows if span is None else span.stop - span.start
        found = self._laid(mask, count)
        if found is None:
            return None
        is_true = found.flatten(2).any(-1) if found.dim() > 2 else found
        return is_true.expand(count, -1) if is_true.shape[0] == 1 else is_true

    def by_row(self, size: Tensor) -> Tensor | None:
        """`[rows]`: the largest of a value of the whole batch in each row; None: it has no rows.

        Of a model that reads sequences only what has positions is taken to have rows: experts sort
        tokens, and contrastive logits are of pairs.
        """
        if self.sequences and size.dim() < 3:
            return None
        found = self._laid(size, self.rows)
        if found is None or not found.numel():
            return None
        most = found.flatten(1).amax(-1)
        return most.expand(self.rows)

    def own_positions(self, columns: int, row: int) -> Tensor | None:
        """`[columns]`: each column's own position in a row; None where they are no positions."""
        for each in self.sequences:
            if each.length == columns:
                return each.own[row if each.own.shape[0] > 1 else 0]
        return None

    def _laid(self, value: Tensor, rows: int) -> Tensor | None:
        """`[rows, positions, ...]`, or `[rows, 1, ...]` of a value without positions."""
        shape = value.shape
        if not shape:
            return None
        lengths = [each.length for each in self.sequences]
        for length in lengths:
            is_flat = shape[0] == rows * length and length > 1 and value.dim() < 3
            if is_flat:  # rows and positions are in one axis
                return value.unflatten(0, (rows, length))
        if shape[0] not in (1, rows):
            is_turned = value.dim() > 2 and shape[0] in lengths and shape[1] == rows
            return value.transpose(0, 1) if is_turned else None
        axis = self._axis(shape, lengths)
        return value[:, None] if axis is None else value.movedim(axis, 1)

    def _axis(self, shape: torch.Size, lengths: Sequence[int]) -> int | None:
        is_pattern = len(shape) > 3 and shape[2] == shape[3]
        if len(shape) > 3 and shape[2] in lengths and (is_pattern or shape[1] not in lengths):
            return 2  # behind heads
        if len(shape) > 1 and shape[1] in lengths:
            return 1
        return None


def _sequences(tensor: Tensor, mask: object) -> Sequences:
    rows, length = tensor.shape[:2]
    ids = None if tensor.is_floating_point() else tensor.detach().cpu()
    own = torch.arange(length).expand(rows, -1)
    is_plain = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length
    if is_plain and isinstance(mask, Tensor):
        own = own_positions(mask[:, -length:].detach().cpu() != 0).expand(rows, -1)
    return Sequences(own, ids)


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict(kwargs)
    return {**bound, **kwargs}
