"""What is kept of a planned run: by its caches, and by the block, in names and lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, final

from torch import Tensor

from tracekit.core.ledger import OTHER, Ledger
from tracekit.core.nest import tensors
from tracekit.core.origins import known_origins
from tracekit.core.site import Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import storages_in_hands
from tracekit.models.planned_passes import LOGITS
from tracekit.tracing.cache import Cache
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.planned import PlannedSite

RECORDED: Final = "recorded"
KEPT: Final = "kept by the block"
GRADIENTS: Final = "gradients"
ORIGINALS: Final = "originals"  # of what is recorded as a copy

_Key = tuple[str, str, str, str]  # path, slot, who keeps it, device


def move(ledger: Ledger, device: str, on_host: Sequence[Cache]) -> None:
    """Say of a run on the CPU that it was on `device`; these caches are on the CPU all the same."""
    kept = {
        ledger.number(tensor)
        for cache in on_host
        for entries in cache.values()
        for entry in entries
        for _, value in _values(entry)
        for tensor in tensors(value)
    }
    for number, account in enumerate(ledger.accounts):
        if account.device == "cpu" and number not in kept:
            account.device = device


@final
class Kept:
    """Names what somebody still holds when the run is over, and sums it up in `sites`."""

    def __init__(self, ledger: Ledger, tree: Tree, caches: Sequence[Cache]) -> None:
        self._ledger = ledger
        self.in_graphs = 0  # bytes that graphs keep, of what the block keeps
        self._sizes: dict[_Key, dict[int, int]] = {}
        for cache in caches:
            self._add_cache(cache)
        for weight in tree.root.parameters():
            self._label(weight.grad, GRADIENTS)
        own = {number for module in tree.root.modules() for number in self._numbers(vars(module))}
        of_caches = [vars(cache._changes.timeline) for cache in caches]  # pyright: ignore[reportPrivateUsage] - the tokens
        self._add_block(own | set(self._numbers(of_caches)))
        self.sites = tuple(PlannedSite(*key, sizes) for key, sizes in self._sizes.items())

    def _add_cache(self, cache: Cache) -> None:
        for path, entries in cache.items():
            for entry in entries:
                for slot, value in _values(entry):
                    for tensor in tensors(value):
                        self._add(
                            path, slot, "cache", self._device(tensor), entry.step, tensor.nbytes
                        )
                        self._label(tensor, RECORDED)

    def _add_block(self, not_of: set[int]) -> None:
        """What the block holds: storages that nothing else accounts for, each once."""
        came: dict[int, Visit] = {}
        for tensor, label in known_origins():
            number = self._ledger.number(tensor)
            if number is not None and isinstance(label, Visit):
                came.setdefault(number, label)
        others = {
            number: account
            for number, account in self._ledger.live().items()
            if number not in not_of and account.label in (OTHER, LOGITS)
        }
        in_hands = storages_in_hands() if set(others) - set(came) else set[int]()
        for number, account in others.items():
            if number not in came and self._ledger.address(number) not in in_hands:
                self.in_graphs += account.size
                continue
            account.label = KEPT
            visit = came.get(number)
            path, slot = ("", "made") if visit is None else (visit.site.path, visit.site.slot.value)
            step = 0 if visit is None else visit.step
            self._add(path, slot, "block", account.device, step, account.size)

    def _add(self, path: str, slot: str, by: str, device: str, step: int, size: int) -> None:
        sizes = self._sizes.setdefault((path, slot, by, device), {})
        sizes[step] = sizes.get(step, 0) + size

    def _label(self, tensor: Tensor | None, label: str) -> None:
        number = None if tensor is None else self._ledger.number(tensor)
        if number is not None and self._ledger.accounts[number].label in (OTHER, LOGITS):
            self._ledger.accounts[number].label = label

    def _device(self, tensor: Tensor) -> str:
        number = self._ledger.number(tensor)
        return str(tensor.device) if number is None else self._ledger.accounts[number].device

    def _numbers(self, nest: Any) -> Iterator[int]:
        for tensor in tensors(nest):
            number = self._ledger.number(tensor)
            if number is not None:
                yield number


def _values(entry: Entry) -> Iterator[tuple[str, Any]]:
    if entry._inputs is not ABSENT:  # pyright: ignore[reportPrivateUsage] - whether it is there
        yield Slot.INPUT.value, entry.inputs
    if entry._output is not ABSENT:  # pyright: ignore[reportPrivateUsage]
        yield Slot.OUTPUT.value, entry.output
