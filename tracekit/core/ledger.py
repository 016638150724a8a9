"""Follow the memory of a run: which storages are made and let go of, when, and what for."""

# A storage is followed by a weak reference, so that it is noticed at once when the last tensor on
# it goes, whoever held it: Python, the model, or the graph of a backward pass. It works on fake
# tensors as on real ones: what is followed is how many bytes a storage has, not what is in it.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, final
from weakref import ReferenceType, ref

from torch import Tensor

from tracekit.core.nest import tensors

OTHER: Final = "activations"  # what nobody gave a name: values on their way, and kept for backward


class Event(NamedTuple):
    """A storage was made (`size` above 0, in bytes), or let go of (below)."""

    key: int
    size: int


@final
@dataclass
class Account:
    """One storage: on which device it is, what for, and how large (bytes)."""

    device: str
    label: str
    size: int


@final
class Ledger:
    """All storages that were seen, in order; `close` it, or it holds on to itself."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.accounts: list[Account] = []
        self.marks: list[int] = []  # how many events there were at the end of each step
        self._live: dict[int, tuple[ReferenceType[Any], int]] = {}  # by address -> its number

    def see(self, nest: Any, label: str = OTHER) -> None:
        """Follow the storages of all tensors in `nest`; a label given later replaces the first."""
        for tensor in tensors(nest):
            self._see(tensor, label)

    def mark(self) -> None:
        """A step has ended."""
        self.marks.append(len(self.events))

    def number(self, tensor: Tensor) -> int | None:
        """The number of the account of a tensor's storage; None if it is not followed."""
        storage = _storage(tensor)
        found = None if storage is None else self._live.get(storage._cdata)
        return None if found is None else found[1]

    def address(self, number: int) -> int | None:
        """Where a storage is that somebody holds."""
        found = (address for address, (_, own) in self._live.items() if own == number)
        return next(found, None)

    def live(self) -> dict[int, Account]:
        """What somebody holds now, by number."""
        return {number: self.accounts[number] for _, number in self._live.values()}

    def close(self) -> None:
        """Follow nothing any more."""
        self._live.clear()

    def _see(self, tensor: Tensor, label: str) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        address, size = storage._cdata, storage.nbytes()
        known = self._live.get(address)
        if known is None:
            number = len(self.accounts)
            self.accounts.append(Account(str(tensor.device), label, size))
            self._live[address] = ref(storage, partial(self._gone, address, number)), number
            self.events.append(Event(number, size))
            return
        account = self.accounts[known[1]]
        if account.label == OTHER:
            account.label = label
        if size != account.size:  # it was resized
            self.events.append(Event(known[1], size - account.size))
            account.size = size

    def _gone(self, address: int, number: int, _: object) -> None:
        known = self._live.get(address)
        if known is not None and known[1] == number:
            del self._live[address]
            self.events.append(Event(number, -self.accounts[number].size))


Held = dict[str, int]  # bytes by label


def most_held(
    events: Iterable[tuple[str, str, int]], held: dict[str, Held] | None = None
) -> dict[str, Held]:
    """What each device held when it held most: bytes by label, by device.

    `events`: device, label and bytes, in order; `held`: what there was before.
    """
    now: dict[str, Held] = {device: dict(each) for device, each in (held or {}).items()}
    totals = {device: sum(each.values()) for device, each in now.items()}
    most, peaks = dict(totals), {device: dict(each) for device, each in now.items()}
    for device, label, size in events:
        own = now.setdefault(device, {})
        own[label] = own.get(label, 0) + size
        totals[device] = totals.get(device, 0) + size
        if totals[device] > most.get(device, -1):
            most[device] = totals[device]
            peaks[device] = dict(own)
    return peaks


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse and the like have none of their own
        return None
