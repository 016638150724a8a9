"""How much memory there is: of each device, and of what the process is allowed to have of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from tracekit.errors import InputError
from tracekit.tracing.planned import ByDevice

_MEMORY: Final = Path("/sys/fs/cgroup")  # where Linux has the limits of containers
_MEMINFO: Final = Path("/proc/meminfo")
_SIZE: Final = re.compile(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def given_capacity(memory: Mapping[str, str | int]) -> ByDevice:
    """What a user says there is: `{"cpu": "16GB", "cuda:0": 24 * 2**30}`, by device."""
    return ByDevice({_device(name): _bytes(size) for name, size in memory.items()})


def found_capacity(devices: list[str], loaded: Mapping[str, int]) -> ByDevice:
    """What these devices have for a run, its weights included; `loaded`: those already there.

    Devices of which nobody knows are left out.
    """
    found = ByDevice()
    for device in devices:
        free = _free(device)
        if free is not None:
            found[device] = free + loaded.get(device, 0)
    return found


def _free(device: str) -> int | None:
    kind = torch.device(device).type
    if kind == "cpu":
        return free_on_host()
    if kind == "cuda" and torch.cuda.is_available():
        index = torch.device(device).index or 0
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return torch.cuda.mem_get_info(index)[0] + unused
    return None


def free_on_host(
    meminfo: Path = _MEMINFO, cgroup: Path = _MEMORY, own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes that this process can still have, within the limits of its container."""
    limits = [_available(meminfo), *(_left(folder) for folder in _folders(cgroup, own))]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _available(meminfo: Path) -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    except OSError:  # no Linux
        return _available_elsewhere()
    return int(found[1]) * 1024 if found else None


def _available_elsewhere() -> int | None:
    try:
        import psutil
    except ImportError:  # it comes with accelerate
        return None
    return int(psutil.virtual_memory().available)


def _folders(cgroup: Path, own: Path) -> list[Path]:
    """The control groups that the process is in: each may have a limit, and the least one holds."""
    folders = [cgroup, cgroup / "memory"]  # version 2, version 1
    try:
        paths = [line.rstrip("\n").split(":", 2)[2] for line in own.read_text().splitlines()]
    except (OSError, IndexError):
        return folders
    for path in dict.fromkeys(paths):
        for base in (cgroup, cgroup / "memory"):
            place = base / path.lstrip("/")
            folders += [each for each in (place, *place.parents) if base in each.parents]
    return list(dict.fromkeys(folders))


def _left(folder: Path) -> int | None:
    """What a control group has left; pages of files that it could drop count as left."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, now = (folder / most).read_text().strip(), (folder / used).read_text().strip()
            stat = (folder / "memory.stat").read_text()
        except OSError:
            continue
        if limit == "max":
            return None
        dropped = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
        return max(0, int(limit) - int(now) + (int(dropped[1]) if dropped else 0))
    return None


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"memory= has devices as keys, as {{'cpu': '16GB', 'cuda:0': '24GB'}}, not {name!r}."
        ) from error
    return "cuda:0" if str(device) == "cuda" else str(device)


def _bytes(size: str | int) -> int:
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InputError(
            f"memory= has sizes as '16GB' (10**9 bytes each), '16GiB' (2**30) or a number of "
            f"bytes, not {size!r}."
        )
    number, power, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.lower()])
