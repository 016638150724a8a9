"""Hold what was recorded while a model generated against one forward over the same tokens."""

# The changes of the run are made again at their absolute positions, and each value is compared as
# soon as it is there.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tracekit.core.nest import first_tensor
from tracekit.core.site import Site, Slot
from tracekit.errors import CacheError, TracekitError
from tracekit.tracing.again import by_position, run_again
from tracekit.tracing.changes import Changes
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.replay import TOLERANCES
from tracekit.tracing.sequence import TokenSequence, calls_in_forwards, stitch
from tracekit.tracing.timeline import Pass, tensor_of


@final
@dataclass(frozen=True)
class Check:
    """How far one site is from the recompute: `deviation` is over the site's largest value.

    `row` and `position` (the column of the batch) say where; `deviation` is None where nothing
    could be compared, for the reason that `verdict` gives.
    """

    site: str
    deviation: float | None
    row: int | None
    position: int | None
    verdict: str

    @property
    def is_right(self) -> bool | None:
        """Whether it agrees; None if nothing was compared."""
        return None if self.deviation is None else self.verdict.startswith("right")


@final
class Verification(Sequence[Check]):
    """What `cache.verify()` found, site by site; true if every site that was compared agrees."""

    def __init__(self, checks: Sequence[Check], tolerance: float) -> None:
        self._checks = tuple(checks)
        self.tolerance = tolerance

    def __bool__(self) -> bool:
        return not self.wrong and any(check.is_right for check in self._checks)

    @property
    def wrong(self) -> list[Check]:
        """The sites that do not agree, worst first."""
        found = [check for check in self._checks if check.is_right is False]
        return sorted(found, key=lambda check: -(check.deviation or 0.0))

    def __getitem__(self, index: Any) -> Any:
        return self._checks[index]

    def __len__(self) -> int:
        return len(self._checks)

    def __repr__(self) -> str:
        compared = [check for check in self._checks if check.deviation is not None]
        head = (
            f"{'VERIFIED' if self else 'NOT VERIFIED'}: {len(compared) - len(self.wrong)} of "
            f"{len(compared)} sites agree within {self.tolerance:.0e} of their largest value; "
            f"{len(self) - len(compared)} were not compared."
        )
        width = max((len(check.site) for check in self._checks), default=4)
        lines = [f"  {'site':{width}}  deviation  row  position  verdict"]
        for check in self._checks:
            deviation = "" if check.deviation is None else f"{check.deviation:.1e}"
            row = "" if check.row is None else check.row
            position = "" if check.position is None else check.position
            lines.append(
                f"  {check.site:{width}}  {deviation:>9}  {row:>3}  {position:>8}  {check.verdict}"
            )
        return "\n".join([head, *lines])


def verify(
    entries: dict[str, list[Entry]], changes: Changes, tolerance: float | None = None
) -> Verification:
    """Recompute what `entries` hold, with the `changes` of their run, and compare.

    CacheError where the run can't be made again.
    """
    comparison = _Comparison(entries, changes, tolerance)
    run_again(changes, set(entries), comparison.see)
    checks = list(comparison.found.values())
    reached = {path for path, _, _ in comparison.found}
    for path in entries:
        if path not in reached:
            checks.append(Check(path, float("inf"), None, None, "it did not run in one forward"))
    limit = comparison.tolerance
    return Verification(checks, TOLERANCES[torch.float32] if limit is None else limit)


@final
class _Comparison:
    """Compares what the recompute gives with what was recorded."""

    def __init__(
        self,
        entries: dict[str, list[Entry]],
        changes: Changes,
        tolerance: float | None,
    ) -> None:
        self._entries = entries
        self._changes = changes
        self._given = tolerance
        self.found: dict[tuple[str, Slot, int], Check] = {}
        self.tolerance = tolerance

    def see(self, site: Site, call: int, value: Any, one: Pass) -> None:
        """The recompute has come to the `call`-th visit of a site."""
        recorded = [each for each in self._entries[site.path] if _has(each, site.slot)]
        if not recorded:
            return
        label = str(site) + (f" (call {call})" if call else "")
        if site.slot is Slot.INPUT:
            value = _of_same_name(value, recorded[0])
        try:
            check = self._compared(label, site, recorded, call, value, one)
        except TracekitError as error:
            check = Check(label, None, None, None, f"not compared: {error.args[0]:.90}")
        self.found[site.path, site.slot, call] = check

    def _compared(
        self, label: str, site: Site, entries: list[Entry], call: int, value: Any, one: Pass
    ) -> Check:
        if all(entry.during is None for entry in entries):
            return self._compared_as_it_is(label, site, entries[call : call + 1], value, one)
        chosen = calls_in_forwards(entries, call)
        odd = _with_other_rows(chosen, site.slot)
        if odd is not None:
            return Check(label, float("inf"), None, odd.start, "WRONG: other rows than before")
        try:
            return self._compared_by_position(label, site, chosen, value, one)
        except TracekitError:
            if len(chosen) > 1:
                raise
            return self._compared_as_it_is(label, site, chosen, value, one)

    def _compared_by_position(
        self, label: str, site: Site, chosen: list[Entry], value: Any, one: Pass
    ) -> Check:
        recorded = stitch(
            chosen,
            [_value(each, site.slot) for each in chosen],
            self._changes.timeline,
            is_partial=True,
            is_flat=True,
        )
        axis, laid = by_position(site, value, one)
        again = self._rows(laid)[:, recorded.columns].to(recorded.device)
        check = self._judged(label, recorded.as_subclass(Tensor), again, recorded)
        if axis == 0 and not check.is_right:
            raise CacheError("rows and positions are in one axis, in an order of its own")
        return check

    def _rows(self, laid: Tensor) -> Tensor:
        span = self._changes.span
        return laid if span is None else laid[span.of(laid.shape[0])]

    def _compared_as_it_is(
        self, label: str, site: Site, entries: list[Entry], value: Any, one: Pass
    ) -> Check:
        """What runs once, outside the decoder's forwards: an encoder, for one."""
        recorded = first_tensor(_value(entries[0], site.slot)) if entries else None
        tensor = tensor_of(site.slot, value)
        if recorded is None or tensor is None:
            raise CacheError("it ran more often in one forward, or has no tensor")
        again = self._rows(tensor).to(recorded.device)
        if again.shape != recorded.shape and recorded.shape[:1] and again.shape[:1]:
            repeats = max(1, again.shape[0] // max(1, recorded.shape[0]))
            if recorded.shape[0] * repeats == one.rows:
                recorded = recorded.repeat_interleave(repeats, 0)
            else:  # the patches of all images in one axis, again for each of a row's sequences
                recorded = recorded.repeat(repeats, *[1] * (recorded.dim() - 1))
        if again.shape != recorded.shape:
            raise CacheError("it runs over other rows or positions in one forward")
        return self._judged(label, recorded, again, None)

    def _judged(
        self, label: str, recorded: Tensor, again: Tensor, sequence: TokenSequence | None
    ) -> Check:
        if recorded.shape != again.shape:
            raise CacheError(f"it has another shape in one forward, {tuple(again.shape)}")
        limit = self._given
        if limit is None:
            limit = max(_tolerance(recorded.dtype), _tolerance(again.dtype))
        self.tolerance = max(self.tolerance or 0.0, limit)
        own, other = recorded.detach().double(), again.detach().to(recorded.dtype).double()
        distance = torch.where(own == other, 0.0, (own - other).abs())
        distance = torch.where(own.isnan() & other.isnan(), 0.0, distance)
        distance = distance.nan_to_num(float("inf"), float("inf"))
        largest = other.abs()
        if sequence is not None:
            mask = sequence.valid.to(distance.device)
            mask = mask.reshape(*mask.shape, *[1] * (distance.dim() - 2))
            distance, largest = distance * mask, torch.where(mask, largest, 0.0)
            distance = torch.where(mask, distance, 0.0)
        largest = largest[largest.isfinite()]
        scale = float(largest.max()) if largest.numel() else 1.0
        if not distance.numel():
            raise CacheError("it has no values")
        place = int(distance.argmax())
        deviation = float(distance.flatten()[place]) / (scale or 1.0)
        where = torch.unravel_index(torch.tensor(place), distance.shape)
        row = int(where[0]) if len(where) else None
        position = sequence.columns[int(where[1])] if sequence is not None else None
        verdict = "right" if deviation <= limit else "WRONG"
        return Check(label, deviation, row, position, verdict + self._part_of(sequence))

    def _part_of(self, sequence: TokenSequence | None) -> str:
        """How much of a run was compared, if not all: what runs in some steps alone has no more."""
        timeline = self._changes.timeline
        whole = timeline.total - timeline.first
        if sequence is None or len(sequence.columns) == whole:
            return ""
        return f" ({len(sequence.columns)} of {whole} positions)"


def _has(entry: Entry, slot: Slot) -> bool:
    value = entry._inputs if slot is Slot.INPUT else entry._output  # pyright: ignore[reportPrivateUsage] - the same house
    return value is not ABSENT


def _value(entry: Entry, slot: Slot) -> Any:
    return entry.input if slot is Slot.INPUT else entry.output


def _of_same_name(inputs: Any, recorded: Entry) -> Any:
    """`(args, kwargs)` with that input alone that was recorded as the first one.

    An encoder is called in one way by generate, and in another by its model.
    """
    args, kwargs = recorded.inputs
    name = next(iter(kwargs), None)
    is_named = not args and not inputs[0] and name in inputs[1]
    return ((inputs[1][name],), {}) if is_named else inputs


def _with_other_rows(entries: list[Entry], slot: Slot) -> Pass | None:
    """The first forward in which what is laid out by position has other rows than before."""
    rows = None
    for entry in entries:
        one, tensor = entry.during, first_tensor(_value(entry, slot))
        if one is None or not one.is_main or tensor is None:
            continue
        if tensor.dim() < 3 or tensor.shape[1] != one.length:
            continue
        if tensor.shape[0] in (1, one.length):  # for all rows, or for each pair of positions
            continue
        if rows not in (None, tensor.shape[0]):
            return one
        rows = tensor.shape[0]
    return None


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCES.get(dtype, 0.0)
