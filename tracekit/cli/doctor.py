"""`tracekit doctor`: is everything there, and does everything hold on this machine?"""

# Imports no torch until the versions are told: that it is missing is for the doctor to say.

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from tracekit.cli.arguments import TINY
from tracekit.cli.output import say, say_json, styled, table
from tracekit.cli.status import CHECK_FAILED, FINE
from tracekit.cli.versions import Version, source, versions

if TYPE_CHECKING:
    from tracekit.cli.guards import Finding

_ADVICE: Final = """\
Something that tracekit promises does not hold here. If a version is marked, begin there; else
install the versions that were tested together (constraints.txt of the repository), and if it
stays, report it with what `tracekit doctor --json` prints."""


def run(options: Namespace) -> int:
    """Print what was found; 0 if all holds."""
    told = _ignored if options.json else say
    found = list(versions())
    told("\n".join(_of_versions(found)))
    missing = [each for each in found if each.is_right is False and not each.installed]
    findings: list[Finding] = []
    machine: dict[str, Any] = {}
    if missing:
        told(f"\nno experiments: {', '.join(each.name for each in missing)} missing")
    else:
        machine = _machine()
        told("\n".join(_of_machine(machine)))
        findings = list(_experiments(options.device, told))
    is_fine = all(each.holds for each in findings) and all(v.is_right is not False for v in found)
    if options.json:
        say_json(_json(found, machine, findings, is_fine))
    else:
        say(_conclusion(found, findings))
    return FINE if is_fine else CHECK_FAILED


def _experiments(place: str, told: Callable[[str], None]) -> Iterator[Finding]:
    """What each experiment on the packaged model finds, told as it comes."""
    from tracekit.cli.guards import EXPERIMENTS, found_by
    from tracekit.cli.machine import one_thread
    from tracekit.cli.opening import device, quiet_transformers
    from tracekit.models.language import LanguageModel

    told(f"\nexperiments on {TINY} ({device(place)})")
    size = max(len(each.claim) for each in EXPERIMENTS)
    with quiet_transformers(), one_thread():
        model = LanguageModel(TINY, device=device(place))
        for experiment in EXPERIMENTS:
            found = found_by(experiment, model)
            line = f"{found.guard or '--'}  {found.claim:{size}}  {found.seen}".rstrip()
            told(f"  {_mark(found.holds)}  {line}")
            yield found


def _of_versions(found: list[Version]) -> list[str]:
    rows = [[each.name, each.installed or "missing", each.wanted, each.cure] for each in found]
    marks = [_mark(each.is_right) for each in found]
    lines = (f"  {mark}  {line}" for mark, line in zip(marks, table(rows), strict=True))
    return ["versions", *lines]


def _machine() -> dict[str, Any]:
    from tracekit.cli.machine import capture_way, devices

    return {**devices(), "capture": capture_way()}


def _of_machine(machine: dict[str, Any]) -> list[str]:
    way = machine["capture"]
    told = f"kept from running in place by {way['skips_by']}; names are {way['names']}"
    lines = {**machine, "capture": told}
    return ["\nmachine", *table([[f"  {name}", text] for name, text in lines.items()])]


def _conclusion(found: list[Version], findings: list[Finding]) -> str:
    held = sum(each.holds for each in findings)
    wrong = [each.name for each in found if each.is_right is False]
    total = f"\n{held} of {len(findings)} experiments hold"
    total += f"; versions to look at: {', '.join(wrong)}" if wrong else ""
    return f"{total}." if held == len(findings) else f"{total}.\n{_ADVICE}"


def _json(
    found: list[Version], machine: dict[str, Any], findings: list[Finding], is_fine: bool
) -> dict[str, Any]:
    return {
        "is_fine": is_fine,
        "versions": [dataclasses.asdict(each) for each in found],
        "declared_in": source(),
        "machine": machine,
        "experiments": [dataclasses.asdict(each) for each in findings],
    }


def _mark(holds: bool | None) -> str:
    word = {True: "ok", False: "FAILED", None: ""}[holds]
    return styled(f"{word:6}", {True: "green", False: "red", None: "dim"}[holds])


def _ignored(_: str) -> None:
    return None
