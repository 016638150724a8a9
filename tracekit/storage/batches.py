"""Batches of rows from the disk, in order or shuffled, the same whenever the seed is."""

# Rows that lie apart are slow to read: each costs as much as many neighbours. So the table is
# cut into runs of neighbouring rows, the runs are put into a random order, as many as fit into a
# buffer are read, and the buffer is shuffled.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tracekit.storage.activations import Rows

_RUN: Final = 256  # rows that are neighbours


@final
class Batches:
    """Batches `[size, …]`; gone through again, they are the same."""

    def __init__(
        self,
        columns: Mapping[str, Rows],
        size: int,
        shuffle: int | None,
        epochs: int | None,
        drop_last: bool,
        buffer_rows: int,
        is_one: bool,
    ) -> None:
        self._columns = columns
        self._size = size
        self._seed = shuffle
        self._epochs = epochs
        self._drops_last = drop_last
        self._buffer = max(buffer_rows, size)
        self._is_one = is_one
        self._rows = len(next(iter(columns.values())))

    def __len__(self) -> int:
        """How many batches there are; TypeError for epochs without end."""
        if self._epochs is None:
            raise TypeError("batches of epochs=None have no length.")
        whole, rest = divmod(self._rows, self._size)
        return self._epochs * (whole + (rest > 0 and not self._drops_last))

    def __iter__(self) -> Iterator[Any]:
        for epoch in count() if self._epochs is None else range(self._epochs):
            for batch in self._epoch(epoch):
                yield next(iter(batch.values())) if self._is_one else batch

    def _epoch(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        rest: dict[str, Tensor] = {}
        for chunk in self._chunks(epoch):
            joined = {
                name: torch.cat([rest[name], part]) if rest else part
                for name, part in chunk.items()
            }
            whole = len(next(iter(joined.values()))) // self._size * self._size
            for start in range(0, whole, self._size):
                yield {name: part[start : start + self._size] for name, part in joined.items()}
            rest = {name: part[whole:] for name, part in joined.items()}
        if rest and len(next(iter(rest.values()))) and not self._drops_last:
            yield rest

    def _chunks(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """The rows of an epoch, as many at a time as the buffer holds."""
        if self._seed is None:
            for start in range(0, self._rows, self._buffer):
                index = slice(start, start + self._buffer)
                yield {name: column[index] for name, column in self._columns.items()}
            return
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        runs = torch.randperm(-(-self._rows // _RUN), generator=random)
        for some in runs.split(max(1, self._buffer // _RUN)):
            index = (some[:, None] * _RUN + torch.arange(_RUN)).flatten()
            index = index[index < self._rows].sort().values
            order = torch.randperm(len(index), generator=random)
            yield {name: column[index][order] for name, column in self._columns.items()}
