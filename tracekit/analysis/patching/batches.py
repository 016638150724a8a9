"""Which patches run as rows of one batch: those of one layer whose positions are near."""

# All rows of a batch begin at the position of the first, so a row goes over positions that its own
# patch can't change. Few rows in each batch keep these few; but each batch costs something of its
# own. The best division of patches in the order of their positions weighs one against the other.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from tracekit.analysis.patching.patches import Target

CALL: Final = 5e-3  # seconds that a call takes beside what it computes
SPEED: Final = 6e10  # operations a second, of one processor
SPEED_OF_ACCELERATOR: Final = 3e13
READING: Final = 12  # tokens whose computation takes as long as to read a layer's weights
READING_OF_ACCELERATOR: Final = 256
OF_NARROWING: Final = 0.75  # of the last layer: all but queries, keys and values
MOST_ROWS: Final = 256  # more gain nothing


@final
@dataclass(frozen=True)
class Change:
    """A patch that changes something in one run: its cell, and the targets that do.

    It changes nothing in front of layer `entry` (None: not to be told), nor before `start`.
    """

    cell: int
    targets: tuple[Target, ...]
    entry: int | None
    start: int


@final
@dataclass(frozen=True)
class Costs:
    """What batches of a model cost, in tokens gone through by one layer; and how many rows fit."""

    length: int
    layers: int
    weights: float  # of a layer
    memory: int  # bytes
    bytes_of_row: Callable[[int, int], int]  # by the first layer, and the first position
    is_fast: bool  # an accelerator

    @property
    def _call(self) -> float:
        speed = SPEED_OF_ACCELERATOR if self.is_fast else SPEED
        return CALL * speed / (2 * self.weights)

    @property
    def _reading(self) -> float:
        return READING_OF_ACCELERATOR if self.is_fast else READING

    def of_a_call(self, entry: int) -> float:
        """What a batch costs beside its tokens, for each layer that it goes through."""
        return self._call / max(self.layers - entry, 1) + self._reading

    def gains_by_narrowing(self, tokens: int) -> bool:
        """Whether a call of the last layer for the last position costs less than it saves."""
        return tokens * OF_NARROWING > self._call + self._reading

    def rows(self, entry: int, start: int) -> int:
        """How many rows fit, at least one."""
        return max(1, min(self.memory // self.bytes_of_row(entry, start), MOST_ROWS))


def batches(changes: Sequence[Change], costs: Costs) -> list[list[Change]]:
    """The changes in batches, those that begin at the same layer together."""
    by_entry: dict[int | None, list[Change]] = {}
    for change in changes:
        by_entry.setdefault(change.entry, []).append(change)
    found: list[list[Change]] = []
    for entry, some in by_entry.items():
        found += _divided(sorted(some, key=lambda one: one.start), entry or 0, costs)
    return found


def _divided(changes: list[Change], entry: int, costs: Costs) -> list[list[Change]]:
    """The cheapest division of changes, in the order of their positions."""
    extra = costs.of_a_call(entry)
    best: list[float] = [0.0]  # of the last ones, from the end
    first_batch: list[int] = [0]
    count = len(changes)
    most: dict[int, int] = {}
    for at in range(count - 1, -1, -1):
        start = changes[at].start
        if start not in most:
            most[start] = costs.rows(entry, start)
        rows = min(most[start], count - at)
        tokens = costs.length - start
        # best[n] is of the last n changes.
        sizes = range(1, rows + 1)
        choices = [(size * tokens + extra + best[count - at - size], size) for size in sizes]
        cost, size = min(choices)
        best.append(cost)
        first_batch.append(size)
    found: list[list[Change]] = []
    at = 0
    while at < count:
        size = first_batch[count - at]
        found.append(changes[at : at + size])
        at += size
    return found


def bytes_of_row(
    config: Any, element: int, length: int, layers: int, has_cut: bool
) -> Callable[[int, int], int]:
    """About how much memory a row takes that begins at a layer and a position."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = int(getattr(text, "hidden_size", 1024))
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    inner = max(inner) if isinstance(inner, (list, tuple)) else int(inner)  # pyright: ignore[reportUnknownArgumentType] - a configuration's
    heads = int(getattr(text, "num_attention_heads", None) or width // 64 or 1)
    vocabulary = int(getattr(text, "vocab_size", 0))

    def taken(entry: int, start: int) -> int:
        rest = length - start
        activations = rest * (10 * width + 3 * inner) + 2 * heads * rest * length
        kept = 2 * length * width * (layers - entry) if has_cut else 0
        return element * (activations + kept + vocabulary * (1 if has_cut else rest))

    return taken
