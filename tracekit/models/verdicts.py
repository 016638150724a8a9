"""Does it fit? What a planned run needs, held against what there is, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final

from tracekit.core.ledger import Held, Ledger
from tracekit.errors import InputError
from tracekit.models.capacity import found_capacity, given_capacity
from tracekit.models.planned_passes import KV_CACHE
from tracekit.models.planned_sites import KEPT, ORIGINALS, RECORDED
from tracekit.models.planned_steps import Told
from tracekit.models.planned_twin import OFFLOADED, WEIGHTS, Weights
from tracekit.tracing.planned import DOES_NOT_FIT, FITS, OFFLOAD, ByDevice, said

Verdict: TypeAlias = Literal["fits", "offload", "does not fit"]
_HOST: Final = "cpu"


@final
@dataclass(frozen=True)
class Need:
    """What a run holds on each device at its peak."""

    peak: ByDevice
    at_peak: Mapping[str, Held]
    kv_cache: ByDevice
    largest: int  # bytes of the weights of the largest module that has its own

    @classmethod
    def of(cls, told: Told, weights: Weights, ledger: Ledger) -> Need:
        """The peak of the run, with the weights where they lie."""
        at_peak = {
            device: {label: size for label, size in held.items() if label != OFFLOADED and size}
            for device, held in told.at_peak.items()
        }
        for device, size in weights.waiting.items():
            if device != "disk":
                at_peak.setdefault(device, {})[OFFLOADED] = size
        for device, size in weights.brought_in.items():
            at_peak.setdefault(device, {})["brought in"] = size
        at_peak = {device: held for device, held in at_peak.items() if held}
        peak = ByDevice({device: sum(held.values()) for device, held in at_peak.items()})
        device = next((each.device for each in ledger.accounts if each.label == KV_CACHE), None)
        behind = told.kv_cache[-1] if told.kv_cache else 0
        kv_cache = ByDevice({device: behind} if device is not None and behind else {})
        return cls(peak, at_peak, kv_cache, weights.largest)


def capacity_of(memory: Mapping[str, str | int] | None, weights: Weights) -> ByDevice:
    """What there is on the devices of a run; InputError if nobody knows."""
    own = given_capacity(memory or {})
    devices = {_HOST, *weights.lying, *weights.brought_in} - {"disk"}
    if memory is None:
        own = found_capacity(sorted(devices), weights.loaded)
    else:
        rest = sorted(devices - set(own))
        own = ByDevice({**own, **found_capacity(rest, weights.loaded)})
    for device in sorted(devices - set(own)):
        raise InputError(
            f"nobody knows how much memory {device} has, as it is not on this machine: say it, as "
            f"in model.plan(..., memory={{{device!r}: '24GB'}})."
        )
    return own


def judged(need: Need, capacity: ByDevice) -> tuple[Verdict, str]:
    """The verdict, and why."""
    over = [device for device in need.peak if need.peak[device] > capacity.get(device, 0)]
    if not over:
        return FITS, "; ".join(
            f"{said(size)} of {said(capacity[device])} on {device}"
            for device, size in need.peak.items()
        ) + "."
    device = over[0]
    short = f"{device} would hold {said(need.peak[device])} and has {said(capacity[device])}"
    if over == [device]:
        for cure in (_record_elsewhere, _weights_elsewhere):
            how = cure(need, capacity, device)
            if how is not None:
                return OFFLOAD, f"{short}; {how}"
    return DOES_NOT_FIT, f"{short}; {_what_to_change(need, device)}"


def _record_elsewhere(need: Need, capacity: ByDevice, device: str) -> str | None:
    kept = _recorded(need.at_peak[device])
    if not kept or need.peak[device] - kept > capacity[device]:
        return None
    if device == _HOST:
        return (
            f"without the {said(kept)} that are recorded it fits: write them to disk as they come, "
            f"or keep less, with modules=, positions or dtype=torch.float16 in tracer.cache()."
        )
    if need.peak[_HOST] + kept > capacity[_HOST]:
        return None
    return (
        f"the {said(kept)} that are recorded there fit on the CPU: tracer.cache(device='cpu'), and "
        f".cpu() on what the block keeps."
    )


def _weights_elsewhere(need: Need, capacity: ByDevice, device: str) -> str | None:
    weights = need.at_peak[device].get(WEIGHTS, 0) + need.at_peak[device].get(OFFLOADED, 0)
    least = need.peak[device] - weights + need.largest
    if not weights or least > capacity[device]:
        return None
    room = capacity[device] - least + need.largest
    if device != _HOST and need.peak[_HOST] + weights - room + need.largest <= capacity[_HOST]:
        return (
            f"with part of the {said(weights)} of weights on the CPU it fits: load it with "
            f"device_map='auto', max_memory={{0: '{_limit(room)}', 'cpu': ...}}."
        )
    return (
        f"with part of the {said(weights)} of weights on disk it fits: load it with "
        f"device_map='auto', offload_folder=..., max_memory={{'cpu': '{_limit(room)}'}}."
    )


def _what_to_change(need: Need, device: str) -> str:
    held = need.at_peak[device]
    parts = {
        "recorded": _recorded(held),
        "weights": held.get(WEIGHTS, 0) + held.get(OFFLOADED, 0),
        "kv_cache": held.get(KV_CACHE, 0),
        "the forward": held.get("activations", 0),
    }
    most = max(parts, key=lambda name: parts[name])
    return f"most of it is {most} ({said(parts[most])}): {_CURES[most]}."


_CURES: Final = {
    "recorded": "record less, with modules=, positions, or dtype=torch.float16 in tracer.cache()",
    "weights": "load it in a smaller dtype or quantised, or over several devices",
    "kv_cache": "take fewer rows or max_new_tokens, or a quantised kv_cache",
    "the forward": "take fewer or shorter rows at a time, or torch.no_grad() if you need no "
    "gradients",
}


def _recorded(held: Held) -> int:
    return sum(held.get(label, 0) for label in (RECORDED, KEPT, ORIGINALS))


def _limit(size: int) -> str:
    """Bytes as `max_memory` of accelerate takes them, rounded down."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{max(0, size) * 10 // unit / 10:.1f}{name}"
