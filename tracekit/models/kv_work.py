"""Buffers that hold a prefix in front and room behind it, lent to one run at a time."""

# Guarantees:
#   - memory that anybody else can still see is never written again: a buffer is lent anew only if
#     its storage has the holders that it had when it was made, and is dropped where that can't be
#     told;
#   - what another stream of a GPU may still read is not written;
#   - what a run changed in place is not there in the next: its tensors share the version counter
#     of the buffer, which has moved then, and the buffer is dropped.

from __future__ import annotations

import sys
from collections import deque
from typing import Any, Final, final

import torch
from torch import Tensor

ROOM_STEP: Final = 64  # positions; runs of nearly the same length can use the same buffers
MOST_KEPT: Final = 2  # sets of buffers; more runs at the same time make theirs anew
MOST_ROWS: Final = 4  # copies of the prefix in a set that is kept: it stays as long as the prefix

# torch 2.1 to 2.13; what graphs on CUDA count references with.
_count: Any = getattr(torch._C, "_storage_Use_Count", None)  # pyright: ignore[reportPrivateUsage] - no public way to tell


@final
class Buffer:
    """A prefix's keys (or values), `(rows, heads, positions, width)`, and room behind them."""

    __slots__ = ("_holders", "_memory", "_storage", "_tensor", "_version")

    def __init__(self, source: Tensor, room: int) -> None:
        length = source.shape[-2]
        with torch.inference_mode(False), torch.no_grad():
            shape = (*source.shape[:2], length + room, source.shape[-1])
            self._tensor = source.new_empty(shape)
            # The same memory under another version counter: what we append is no change to what
            # was there, and must not look like one.
            self._memory = self._tensor.data
            self._memory[:, :, :length] = source
        self._storage = self._tensor.untyped_storage()
        self._version = self._tensor._version  # pyright: ignore[reportPrivateUsage] - the only way to tell
        self._holders = self._count_holders()

    def holds(self, new: Tensor, start: int) -> bool:
        """Whether `new` can be written from position `start` on."""
        own = self._memory
        is_alike = new.dtype == own.dtype and new.device == own.device
        is_alike = is_alike and new.shape[:2] == own.shape[:2] and new.shape[-1] == own.shape[-1]
        return is_alike and start + new.shape[-2] <= own.shape[-2]

    def append(self, new: Tensor, start: int) -> Tensor:
        """All that is there up to the end of `new`, which is written from `start` on."""
        end = start + new.shape[-2]
        self._memory[:, :, start:end] = new
        return self._tensor[:, :, :end]

    @property
    def is_untouched(self) -> bool:
        """Whether nobody else sees this memory, or has changed it in place."""
        if self._holders is None:
            return False
        version = self._tensor._version  # pyright: ignore[reportPrivateUsage] - the only way to tell
        return version == self._version and self._count_holders() == self._holders

    def _count_holders(self) -> tuple[int, int, int] | None:
        """Of the memory by tensors, and of two objects that Python code can get at besides."""
        if _count is None:
            return None
        tensors = _count(self._storage._cdata)  # pyright: ignore[reportPrivateUsage] - as torch itself asks
        return tensors, sys.getrefcount(self._storage), sys.getrefcount(self._tensor)


@final
class Work:
    """The buffers of one run, one pair for each layer, filled when the layer first appends."""

    def __init__(self, rows: int, room: int, stream: object = None) -> None:
        self.rows = rows
        self.room = room
        self.stream = stream  # on which it is written and read
        self._pairs: dict[int, tuple[Buffer, Buffer]] = {}

    def append(
        self, layer: int, shared: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], start: int
    ) -> tuple[Tensor, Tensor] | None:
        """The keys and values of `layer` with `new` from `start` on; None if there is no room."""
        pair = self._pairs.get(layer)
        if pair is None:
            pair = self._pairs[layer] = Buffer(shared[0], self.room), Buffer(shared[1], self.room)
        keys, values = pair
        if not keys.holds(new[0], start) or not values.holds(new[1], start):
            return None
        return keys.append(new[0], start), values.append(new[1], start)

    @property
    def is_untouched(self) -> bool:
        """Whether another run may have all of it."""
        return all(each.is_untouched for pair in self._pairs.values() for each in pair)


@final
class Pool:
    """What runs behind one prefix have used, and may use again; any thread may ask."""

    def __init__(self) -> None:
        self._free: deque[Work] = deque(maxlen=MOST_KEPT)  # its methods are atomic

    def lend(self, rows: int, positions: int, device: torch.device | None = None) -> Work:
        """Buffers for so many rows and appended positions, which no other run has."""
        on_gpu = device is not None and device.type == "cuda"
        stream = torch.cuda.current_stream(device) if on_gpu else None
        for _ in range(MOST_KEPT):
            try:
                work = self._free.popleft()
            except IndexError:
                break
            is_fit = work.rows == rows and work.room >= positions and work.stream == stream
            if is_fit and work.is_untouched:
                return work
        return Work(rows, -(-positions // ROOM_STEP) * ROOM_STEP, stream)

    def take_back(self, work: Work, rows_of_prefix: int) -> None:
        """The run is over; whether somebody still holds its tensors is seen when it is lent."""
        if _count is not None and work.rows <= MOST_ROWS * rows_of_prefix:
            self._free.append(work)
