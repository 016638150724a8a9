"""Make the entries of a cache out of what a recorder's hooks have noted, in order."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeAlias, final

from torch import nn

from tracekit.core.site import Site, Slot
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.timeline import Pass

# One slot of one call: the module, the slot, the step, the value as it was kept, and the versions
# of its tensors then. A plain tuple: to make anything else takes a tenth of all that a hook takes.
Record: TypeAlias = tuple[nn.Module, Slot, int, Any, int | tuple[int, ...]]


@final
class Listing:
    """The entries so far, by path; or by site, if each value `is_apart`."""

    def __init__(self, paths: Mapping[nn.Module, str]) -> None:
        self.found: dict[str, list[Entry]] = {}
        self.count = 0  # of records of which there are entries
        self.is_apart = False
        self.new: list[Entry] | None = None  # those that are made, if somebody asks
        self._paths = paths
        self._begun: dict[str, list[Entry]] = {}  # with inputs, and still without output

    def add(
        self,
        records: Sequence[Record],
        refused: Container[int],
        awaited: Mapping[int, Any],
        marks: Sequence[int],
        forwards: Sequence[Pass],
    ) -> None:
        """Make entries of the records that came since, but for those that were `refused`.

        `awaited` has the gradients of some; `marks` says how many there were when each of the
        `forwards` began.
        """
        passes = iter([*zip(marks, forwards, strict=True), (-1, None)])
        following, during = next(passes), None
        for index in range(self.count, len(records)):
            if index in refused:
                continue
            while index >= following[0] >= 0:
                during, following = following[1], next(passes)
            self._add(records[index], awaited.get(index, ABSENT), during)
        self.count = len(records)

    def _add(self, record: Record, awaited: Any, during: Pass | None) -> None:
        module, slot, step, value, _ = record
        path = self._paths[module]
        if self.is_apart:
            path, slot = str(Site(path, slot)), Slot.OUTPUT
        if slot is Slot.OUTPUT and self._begun.get(path):
            entry = self._begun[path].pop()
            entry._output, entry._grad = value, awaited  # pyright: ignore[reportPrivateUsage] - it is being made
            return
        entries = self.found.setdefault(path, [])
        is_again = bool(entries) and entries[-1].step == step
        call = entries[-1].call + 1 if is_again else 0
        if slot is Slot.OUTPUT:
            entries.append(Entry(path, step, call, ABSENT, value, awaited, during))
        else:
            entries.append(Entry(path, step, call, value, ABSENT, ABSENT, during))
            self._begun.setdefault(path, []).append(entries[-1])
        if self.new is not None:
            self.new.append(entries[-1])
