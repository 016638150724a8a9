"""A Plan: how much memory a run will hold, where, at which step, and whether there is so much."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, final

from tracekit.errors import CacheError

FITS: Final = "fits"
OFFLOAD: Final = "offload"
DOES_NOT_FIT: Final = "does not fit"
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_MOST: Final = 8  # sites in the table


@final
class ByDevice(dict[str, int]):
    """Bytes by device."""

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return sum(self.values())

    def __missing__(self, device: str) -> int:
        return 0

    def __str__(self) -> str:
        return ", ".join(f"{said(size)} on {device}" for device, size in self.items()) or "0 B"


@final
@dataclass(frozen=True)
class PlannedSite:
    """What is kept of one value: of which module, in which steps, how many bytes in each.

    `slot`: "output", "input", "result", or "made" for tensors that the block makes itself, which
    have no path. `kept_by`: "cache" (a tracer.cache) or "block" (a name, a list).
    """

    path: str
    slot: str
    kept_by: str
    device: str
    by_step: Mapping[int, int]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps in which there is something to keep, in order."""
        return tuple(self.by_step)

    @property
    def bytes(self) -> int:
        """Of all steps."""
        return sum(self.by_step.values())

    def __repr__(self) -> str:
        steps = f", {len(self.by_step)} steps" if len(self.by_step) > 1 else ""
        name = f"{self.path}.{self.slot}" if self.path else self.slot
        return f"PlannedSite({name}: {said(self.bytes)} on {self.device}{steps})"


@final
@dataclass(frozen=True, repr=False)
class Plan:
    """What a run will hold in memory; prints as a table, and is true if it fits as it is written.

    `peak[device]`: bytes at the moment when most is held, all included (`at_peak`: of what).
    `recorded`: what caches and the block keep, tensor by tensor; what shares memory is once in the
    peak. `kv_cache_by_step`: bytes after each step. `weights`: where they lie; with offload,
    `brought_in` is the most that is brought to a device at once. `capacity[device]`: what this run
    may have there, weights included; devices of which that is unknown are not in it. `verdict` is
    "fits", "offload" (it would, if something moved: `why` says what), or "does not fit". `notes`
    says what is not counted, and what is a bound.
    """

    steps: int
    sites: tuple[PlannedSite, ...]
    weights: ByDevice
    brought_in: ByDevice
    kv_cache: ByDevice
    kv_cache_by_step: tuple[int, ...]
    peak: ByDevice
    at_peak: Mapping[str, Mapping[str, int]]
    capacity: ByDevice
    verdict: Literal["fits", "offload", "does not fit"]
    why: str
    notes: tuple[str, ...] = field(default=())

    @property
    def recorded(self) -> ByDevice:
        """Bytes of all that is kept, of all sites and steps."""
        return recorded_of(self.sites)

    @property
    def forwards(self) -> ByDevice:
        """Of the peak: values on their way through the model, and kept for a backward pass."""
        found = {device: held.get("activations", 0) for device, held in self.at_peak.items()}
        return ByDevice(found)

    def __bool__(self) -> bool:
        return self.verdict == FITS

    def to_json(self) -> str:
        """All figures, in bytes."""
        told: dict[str, Any] = {
            **asdict(self, dict_factory=dict),
            "recorded": dict(self.recorded),
            "sites": [
                {**asdict(site), "by_step": list(site.by_step.items())} for site in self.sites
            ],
        }
        return json.dumps(told, indent=1)

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def recorded_of(sites: tuple[PlannedSite, ...]) -> ByDevice:
    """Bytes of what these sites keep."""
    found = ByDevice()
    for site in sites:
        found[site.device] += site.bytes
    return found


def plan_of(planner: Any) -> Plan:
    """The plan of a tracer; CacheError where there is none."""
    plan = getattr(planner, "made", None)
    if plan is None:
        raise CacheError(
            "tracer.plan is there behind the block of `with model.plan(input) as tracer:`."
        )
    return plan


def said(size: float) -> str:
    """Bytes for people: "1.5 MiB"."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {_UNITS[unit]}" if unit and size < 1000 else f"{size:.0f} {_UNITS[unit]}"


def _lines(plan: Plan) -> list[str]:
    lines = [f"Plan: {plan.verdict}. {plan.why}"]
    devices = list(plan.peak)
    rows = [("", *devices)]
    rows += [(name, *(_cell(each, device) for device in devices)) for name, each in _table(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        shown = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {name.ljust(widths[0])}  {shown}")
    count = len({(site.path, site.slot) for site in plan.sites})
    if plan.sites:
        lines.append(f"  {count} sites, {plan.steps} step{'s' * (plan.steps != 1)}:")
        largest = sorted(plan.sites, key=lambda site: -site.bytes)[:_MOST]
        lines += [f"    {_line(site)}" for site in largest]
        lines += [f"    … {len(plan.sites) - _MOST} more"] if len(plan.sites) > _MOST else []
    return [*lines, *(f"  {note}" for note in plan.notes)]


def _table(plan: Plan) -> list[tuple[str, Mapping[str, int]]]:
    parts = [
        ("weights", plan.weights),
        ("brought in", plan.brought_in),
        ("kv_cache", plan.kv_cache),
        ("recorded", plan.recorded),
        ("originals", _part(plan, "originals")),
        ("gradients", _part(plan, "gradients")),
        ("forward", plan.forwards),
        ("peak", plan.peak),
        ("there is", plan.capacity),
    ]
    return [part for part in parts if part[1] or part[0] == "peak"]


def _part(plan: Plan, label: str) -> dict[str, int]:
    return {device: held[label] for device, held in plan.at_peak.items() if label in held}


def _cell(sizes: Mapping[str, int], device: str) -> str:
    return said(sizes[device]) if sizes.get(device) else "-"


def _line(site: PlannedSite) -> str:
    name = f"{site.path}.{site.slot}" if site.path else "made in the block"
    each = list(site.by_step.values())
    if len(each) < 2:
        return f"{name}  {said(site.bytes)}"
    return f"{name}  {said(site.bytes)} ({said(each[0])}, … {said(each[-1])})"
