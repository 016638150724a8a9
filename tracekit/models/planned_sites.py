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
from tracekit.models.planned_passes import LOGITS
from tracekit.tracing.cache import Cache
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.planned import PlannedSite

RECORDED: Final = "recorded"
KEPT: Final = "kept by the block"
GRADIENTS: Final = "gradients"

_Key = tuple[str, str, str, str]  # path, slot, who keeps it, device


@final
class Kept:
    """Names what somebody still holds when the run is over, and sums it up in `sites`."""

    def __init__(self, ledger: Ledger, tree: Tree, caches: Sequence[Cache]) -> None:
        self._ledger = ledger
        self._sizes: dict[_Key, dict[int, int]] = {}
        for cache in caches:
            self._add_cache(cache)
        for weight in tree.root.parameters():
            self._label(weight.grad, GRADIENTS)
        own = {number for module in tree.root.modules() for number in self._numbers(vars(module))}
        self._add_block(own)
        self.sites = tuple(PlannedSite(*key, sizes) for key, sizes in self._sizes.items())

    def _add_cache(self, cache: Cache) -> None:
        for path, entries in cache.items():
            for entry in entries:
                for slot, value in _values(entry):
                    for tensor in tensors(value):
                        self._add(
                            path, slot, "cache", str(tensor.device), entry.step, tensor.nbytes
                        )
                        self._label(tensor, RECORDED)

    def _add_block(self, not_of: set[int]) -> None:
        """What the block holds: storages that nothing else accounts for, each once."""
        came: dict[int, Visit] = {}
        for tensor, label in known_origins():
            number = self._ledger.number(tensor)
            if number is not None and isinstance(label, Visit):
                came.setdefault(number, label)
        for number, account in self._ledger.live().items():
            if number in not_of or account.label not in (OTHER, LOGITS):
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
