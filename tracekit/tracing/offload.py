"""Move what records hold on an accelerator to the host, many values at a time, beside the model."""

# A hook keeps a value where it is, as it would for a cache on the same device. Records wait until
# there are enough for one copy, of several layers and steps; then their values are replaced by
# parcels, and when all has arrived, these by tensors. So what is true of records that share memory
# with the model is true of those that wait: what it overwrites was copied, or is noticed.

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.core import streams
from tracekit.core.keep import Keep
from tracekit.core.nest import map_leaves, tensors
from tracekit.core.ring import Parcel, Ring
from tracekit.core.settings import settings
from tracekit.core.versions import version
from tracekit.errors import OffloadError
from tracekit.tracing.listing import Record

# Values of one copy. What surrounds it costs as much as a dozen of them; more of them would save
# nothing, and hold what is small in many blocks of the device's memory.
MOST = 256

OVERWRITTEN: Final = (-2,)  # no tensors have these versions

_PLAIN = (Tensor, torch.nn.Parameter)


@final
class Offload:
    """An Outbox: tensors wait on their device until it ships the records that have them."""

    def __init__(self, records: list[Record], host: torch.device, capacity: int) -> None:
        self._records = records
        self._host = host
        self._capacity = capacity  # bytes of pinned memory, for each device
        self._rings: dict[torch.device, Ring | None] = {}  # None: values can't wait there
        self._waiting = 0  # bytes that records hold on devices
        self._room = 0  # of these; what fits a slab
        self._shipped = 0  # records
        self._arrived = 0  # of these
        self._failure: str | None = None

    # -- an Outbox ------------------------------------------------------------------------------

    def takes(self, tensor: Tensor) -> bool:
        """Whether `tensor` can wait where it is."""
        return self._ring_for(tensor) is not None

    def take(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, for a record to come; on the host, where it can't wait."""
        ring = self._ring_for(tensor)
        if ring is None:
            return tensor.to(self._host)
        if self._waiting >= self._room or len(self._records) - self._shipped >= MOST:
            self.ship()
        if not ring.lane.is_current():
            self._leave(tensor.device, ring)
        self._waiting += tensor.untyped_storage().nbytes()
        return tensor

    def _ring_for(self, leaf: Any) -> Ring | None:
        """The ring that moves a value; None if it is on the host, or no plain tensor."""
        if not _is_plain(leaf) or leaf.device == self._host:
            return None
        return self._ring_of(leaf.device)

    def _ring_of(self, device: torch.device) -> Ring | None:
        if device in self._rings:
            return self._rings[device]
        lane = streams.lane_of(device)
        ring = None if lane is None else Ring(lane, self._capacity)
        self._rings[device] = ring
        if ring is not None:
            self._room = ring.size
        return ring

    def _leave(self, device: torch.device, ring: Ring) -> None:
        """The model goes on in another stream, which knows nothing of the order in this one."""
        self.ship()
        ring.fence()
        del self._rings[device]
        self._ring_of(device)

    # -- records --------------------------------------------------------------------------------

    def ship(self) -> None:
        """Begin to move what records hold, behind what made it and before what overwrites it."""
        loads: dict[Ring, list[tuple[Tensor, Parcel]]] = {}
        packed = [
            self._packed(record, loads) for record in islice(self._records, self._shipped, None)
        ]
        for ring, load in loads.items():
            ring.send(load)
        self._records[self._shipped :] = packed  # last: an interrupt lets all be sent again
        self._shipped = len(self._records)
        self._waiting = 0

    def fence(self) -> None:
        """Wait until all has arrived, and put it into the records."""
        self.ship()
        for ring in self._rings.values():
            if ring is not None:
                ring.fence()
        self._deliver()

    def finish(self) -> set[int]:
        """Fence at the end; the records of which not all came, because something failed."""
        try:
            self.fence()
        except RuntimeError as error:  # it was a CUDA error, and another run may be without
            self._failure = str(error).partition("\n")[0]
            self._deliver()
        lost = {
            index
            for index in range(self._arrived, len(self._records))
            if any(self._is_away(leaf) for leaf in _leaves(self._records[index][3]))
        }
        self._rings.clear()
        return lost

    def check(self) -> None:
        """OffloadError if a device, or the host's memory, failed with values under way."""
        if self._failure is not None:
            raise OffloadError(
                f"what was recorded last did not come to the host, and is not in the cache: "
                f"{self._failure}. An operation of the model may be the cause, as devices tell "
                f"late: with tracekit.settings.offload_bytes = 0 each value is copied at once."
            )

    def _packed(self, record: Record, loads: dict[Ring, list[tuple[Tensor, Parcel]]]) -> Record:
        module, slot, step, value, then = record

        def packed(leaf: Any) -> Any:
            ring = self._ring_for(leaf)
            if ring is None:
                return leaf
            parcel = Parcel(leaf)
            loads.setdefault(ring, []).append((leaf, parcel))
            return parcel

        sent = packed(value) if type(value) is Tensor else map_leaves(packed, value)
        return module, slot, step, sent, _renewed(value, then, sent)

    def _deliver(self) -> None:
        """Put what has arrived into the records, as far as that goes without a gap."""
        while self._arrived < self._shipped:
            module, slot, step, value, then = self._records[self._arrived]
            parcels = [value] if type(value) is Parcel else _leaves(value)
            if any(isinstance(leaf, Parcel) and leaf.value is None for leaf in parcels):
                return
            came = _opened(value) if type(value) is Parcel else map_leaves(_opened, value)
            self._records[self._arrived] = module, slot, step, came, _renewed(value, then, came)
            self._arrived += 1

    def _is_away(self, leaf: object) -> bool:
        return isinstance(leaf, Parcel) or (isinstance(leaf, Tensor) and self.takes(leaf))


def offload_of(keep: Keep, records: list[Record]) -> Offload | None:
    """What moves values to the host as `keep` says; None where that is not needed, or not asked."""
    is_to_host = keep.device is not None and keep.device.type == "cpu" and keep.detach
    if not is_to_host or not settings.offload_bytes or not streams.has_lanes():
        return None
    assert keep.device is not None
    return Offload(records, keep.device, settings.offload_bytes)


def _is_plain(leaf: Any) -> bool:
    """Whether it is a tensor that is nothing but its bytes."""
    return (
        type(leaf) in _PLAIN
        and leaf.layout is torch.strided
        and not leaf.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)  # pyright: ignore - it has no other name
    )


def _opened(leaf: object) -> object:
    return leaf.value if isinstance(leaf, Parcel) else leaf


def _leaves(value: Any) -> Iterator[object]:
    found: list[object] = []
    map_leaves(found.append, value)
    return iter(found)


def _renewed(before: Any, then: int | tuple[int, ...], now: Any) -> int | tuple[int, ...]:
    """The versions of `now`; if what was there `before` has others than `then`, OVERWRITTEN."""
    found = version(before) if isinstance(then, int) else tuple(map(version, tensors(before)))
    if found != then:
        return OVERWRITTEN
    return version(now) if isinstance(now, Tensor) else tuple(map(version, tensors(now)))
