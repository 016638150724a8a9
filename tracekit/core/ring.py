"""A bounded ring of pinned memory, through which values leave a device without holding it up."""

# Guarantees:
#   - what comes out is what went in, whatever the model does to its memory afterwards: values are
#     gathered on the stream that computes, in its order, and copied beside it behind that;
#   - memory is written again only when the copy before has ended, and was taken out of the ring;
#   - nothing is dropped: a full ring waits for the oldest copy, and what is larger than a slab goes
#     in pieces;
#   - what is handed out is ordinary memory, of each value by itself;
#   - whatever is interrupted is done again from its beginning by the next call, or by `fence`.
#
# Values are held until they have arrived: each may be of another stream's pool of memory, which
# knows nothing of ours.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tracekit.core.streams import Event, Lane, bytes_of

SLABS = 16  # one is filled, others are under way or wait to be emptied
ALIGNED = 16  # bytes; what a slab is a multiple of

_COMMON = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


@final
class Parcel:
    """A value on its way: `value` is the tensor on the host, when all of it has arrived."""

    __slots__ = ("_bytes", "_dtype", "_made", "_shape", "value")

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._made: Tensor | None = None
        self._bytes: Tensor | None = None  # of the same memory
        self.value: Tensor | None = None

    def put_whole(self, arrived: Tensor) -> None:
        """Take all its numbers."""
        self.value = arrived.view(self._shape).clone()

    def put(self, start: int, arrived: Tensor) -> None:
        """Take bytes of it, from `start`; they come in order."""
        if self._bytes is None or self._made is None:
            self._made = torch.empty(self._shape, dtype=self._dtype, device="cpu")
            self._bytes = self._made.view(-1).view(torch.uint8)
        stop = start + arrived.numel()
        self._bytes[start:stop].copy_(arrived)
        if stop == self._bytes.numel():
            self.value = self._made


@final
@dataclass(slots=True)
class Piece:
    """A flat part of a parcel on the device: bytes from `start`, or all its numbers (None)."""

    parcel: Parcel
    start: int | None
    flat: Tensor
    size: int  # bytes


@final
@dataclass
class Slab:
    """As many bytes on the device as on the host, and what is in them."""

    staging: Tensor
    pinned: Tensor
    pieces: list[Piece] = field(default_factory=list[Piece])
    end: Event | None = None  # of the copy that is under way; None: there is none
    number: int = 0  # of that copy


@final
class Ring:
    """Sends values to the host by `lane`, through at most `capacity` bytes of pinned memory.

    And as many on the device.
    """

    def __init__(self, lane: Lane, capacity: int) -> None:
        self.lane = lane
        self.size = max(capacity // SLABS // ALIGNED, 1) * ALIGNED  # of a slab
        self._most = max(capacity // self.size, 1)  # slabs
        self._slabs: list[Slab] = []
        self._count = 0  # copies so far

    def send(self, load: Sequence[tuple[Tensor, Parcel]]) -> None:
        """Begin to move values; returns before they arrive, if there is room for them."""
        with torch.inference_mode(False), torch.no_grad(), self.lane.computing():
            for pieces in self._batches(load):
                slab = self._vacant()
                if slab is None:
                    self._send_at_once(pieces)
                else:
                    self._depart(slab, pieces)

    def fence(self) -> None:
        """Wait until all has arrived that was sent."""
        with torch.inference_mode(False), torch.no_grad():
            for slab in self._under_way():
                self._take_out(slab)

    def _batches(self, load: Sequence[tuple[Tensor, Parcel]]) -> Iterator[list[Piece]]:
        """What goes into one slab each; of one dtype as a rule, which is quicker to move."""
        pieces: list[Piece] = []
        room = self.size
        for tensor, parcel in load:
            for piece in self._pieces(tensor, parcel):
                if piece.size > room:
                    yield pieces
                    pieces, room = [], self.size
                pieces.append(piece)
                room -= piece.size
        if pieces:
            yield pieces

    def _pieces(self, tensor: Tensor, parcel: Parcel) -> Iterator[Piece]:
        """Parts of a value that fit a slab each."""
        if tensor.dtype in _COMMON and 0 < tensor.nbytes <= self.size and not tensor.is_neg():
            yield Piece(parcel, None, tensor.reshape(-1), tensor.nbytes)
            return
        flat = bytes_of(tensor)
        if not flat.numel():
            parcel.put(0, torch.empty(0, dtype=torch.uint8, device="cpu"))
        for start in range(0, flat.numel(), self.size):
            part = flat[start : start + self.size]
            yield Piece(parcel, start, part, part.numel())

    def _depart(self, slab: Slab, pieces: list[Piece]) -> None:
        size = sum(piece.size for piece in pieces)
        staging, pinned = slab.staging[:size], slab.pinned[:size]
        slab.pieces = pieces
        self.lane.gather([piece.flat for piece in pieces], staging)
        self._count += 1
        slab.number = self._count
        slab.end = self.lane.copy(staging, pinned, self.lane.mark())

    def _send_at_once(self, pieces: list[Piece]) -> None:
        """Where there is no memory for a ring: the model waits for each."""
        for piece in pieces:
            piece.parcel.put(piece.start or 0, bytes_of(piece.flat).to("cpu"))

    # -- slabs ----------------------------------------------------------------------------------

    def _vacant(self) -> Slab | None:
        """One that may be written; waits for the oldest copy if there is none, and no room."""
        self._take_out_what_arrived()
        vacant = next((slab for slab in self._slabs if slab.end is None), None)
        if vacant is not None:
            return vacant
        if len(self._slabs) < self._most:
            return self._another() or self._oldest()
        return self._oldest()

    def _another(self) -> Slab | None:
        try:
            slab = Slab(self.lane.staging(self.size), self.lane.pinned(self.size))
        except RuntimeError:  # the device is full, or the host gives no more pinned memory
            self._most = len(self._slabs)
            return None
        self._slabs.append(slab)
        return slab

    def _oldest(self) -> Slab | None:
        slab = next(iter(self._under_way()), None)
        if slab is not None:
            self._take_out(slab)
        return slab

    def _under_way(self) -> list[Slab]:
        return sorted(
            (slab for slab in self._slabs if slab.end is not None), key=lambda slab: slab.number
        )

    def _take_out_what_arrived(self) -> None:
        for slab in self._under_way():
            if slab.end is None or not slab.end.is_done():
                return
            self._take_out(slab)

    def _take_out(self, slab: Slab) -> None:
        """Wait for a slab, and empty it into ordinary memory; then it may be written again."""
        assert slab.end is not None
        slab.end.wait()
        sizes = [piece.size for piece in slab.pieces]
        arrived = slab.pinned[: sum(sizes)]
        dtypes = {piece.flat.dtype if piece.start is None else None for piece in slab.pieces}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        if dtype is not None:
            parts = arrived.view(dtype).split([size // dtype.itemsize for size in sizes])
            for piece, part in zip(slab.pieces, parts, strict=True):
                piece.parcel.put_whole(part)
        else:
            for piece, part in zip(slab.pieces, arrived.split(sizes), strict=True):
                piece.parcel.put(piece.start or 0, part)
        slab.end = None
        slab.pieces = []

    def __repr__(self) -> str:
        under_way = len(self._under_way())
        return f"Ring({self.lane}, {len(self._slabs)} slabs of {self.size} bytes, {under_way} sent)"
