"""What an edit did to what a model predicts: total variation, divergence, top-1 flips."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tracekit.core.nest import tensors
from tracekit.tracing.sightings import copied
from tracekit.tracing.timeline import PADDING
from tracekit.tracing.verified.grid import Grid, Tell
from tracekit.tracing.verified.report import Flip, LogitsChange


def logits_of(result: Any) -> Tensor | None:
    """The logits of what a model returned, on the CPU; None where it says of none."""
    found = getattr(result, "logits", None)
    return copied(found) if isinstance(found, Tensor) else None


def numbers_of(result: Any) -> Tensor | None:
    """The logits, or else the first numbers that a model returned, on the CPU."""
    found = logits_of(result)
    if found is not None:
        return found
    numbers = (each for each in tensors(result) if each.is_floating_point())
    first = next(numbers, None)
    return None if first is None else copied(first)


def change_of_logits(
    clean: Tensor, now: Tensor, grid: Grid, tell: Tell | None
) -> LogitsChange | None:
    """How far the predictions are from those of the clean run; None for other shapes."""
    if clean.shape != now.shape or clean.dim() not in (2, 3):
        return None
    clean, now = clean.double(), now.double()
    if clean.dim() == 2:
        clean, now = clean[:, None], now[:, None]
    variation, divergence = distances(clean, now)
    rows, columns = variation.shape
    own = [_columns(grid, columns, row) for row in range(rows)]
    return LogitsChange(
        tuple(tuple(each for each in places if each != PADDING) for places in own),
        tuple(_row(values, places) for values, places in zip(variation, own, strict=True)),
        tuple(_row(values, places) for values, places in zip(divergence, own, strict=True)),
        tuple(_flips(clean, now, own, tell)),
        float((clean - now).abs().nan_to_num(0.0).max()) if clean.numel() else 0.0,
    )


def distances(clean: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation and KL(clean || now), in nats, of logits `[..., vocabulary]`."""
    before, after = clean.log_softmax(-1), now.log_softmax(-1)
    variation = (before.exp() - after.exp()).abs().sum(-1) / 2
    terms = before.exp() * (before - after)
    return variation, terms.nan_to_num(0.0).sum(-1).clamp(min=0.0)  # 0 · -inf is 0


def _columns(grid: Grid, columns: int, row: int) -> list[int]:
    """The own position of each column of the logits; the last ones, where there are fewer."""
    if not grid.sequences:
        return list(range(columns))
    own = grid.sequences[0].own
    places = own[row if own.shape[0] > row else 0].tolist()
    return places[-columns:] if columns <= len(places) else list(range(columns))


def _row(values: Tensor, places: list[int]) -> tuple[float, ...]:
    numbers = values.tolist()
    return tuple(it for it, at in zip(numbers, places, strict=True) if at != PADDING)


def _flips(clean: Tensor, now: Tensor, own: list[list[int]], tell: Tell | None) -> list[Flip]:
    was, is_now = clean.argmax(-1), now.argmax(-1)
    found: list[Flip] = []
    for row, column in (was != is_now).nonzero().tolist():
        if own[row][column] != PADDING:
            ids = [int(was[row, column]), int(is_now[row, column])]
            first, second = map(str, ids if tell is None else tell(ids))
            found.append(Flip(row, own[row][column], first, second))
    return found
