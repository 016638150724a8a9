"""`tracekit activations`: what a harvest has written into a directory, and whether it is sound."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from tracekit.cli.output import say, say_json, styled, table
from tracekit.cli.status import CHECK_FAILED, FINE
from tracekit.errors import StorageError
from tracekit.storage.activations import Activations, load_activations


def run(options: Namespace) -> int:
    """Print what is there; CHECK_FAILED, with the file's name, for what is damaged or missing."""
    try:
        found = load_activations(options.directory, partial=options.partial)
        if options.check:
            found.check()
    except StorageError as error:
        _tell_fault(options, error)
        return CHECK_FAILED
    if options.json:
        say_json(_told(options, found))
    else:
        _tell(options, found)
    return FINE


def _told(options: Namespace, found: Activations) -> dict[str, Any]:
    sites = {
        site: {"shape": list(rows.shape), "dtype": str(rows.dtype).removeprefix("torch.")}
        for site, rows in found.items()
    }
    return {
        "directory": options.directory,
        "is_sound": True if options.check else None,
        "rows": found.rows,
        "sites": sites,
        "counts": dict(found.counts),
        "spec": dict(found.spec),
    }


def _tell_fault(options: Namespace, error: StorageError) -> None:
    if options.json:
        say_json({"directory": options.directory, "is_sound": False, "fault": str(error)})
    else:
        say(f"{styled('not sound', 'red')}: {error}")


def _tell(options: Namespace, found: Activations) -> None:
    model = found.spec["model"]
    say(styled(f"{found.rows:,} rows of {model['class']} in {options.directory}", "bold"))
    say("  ".join(f"{count:,} {name}" for name, count in found.counts.items()))
    rows = [
        [site, str(list(each.shape)), str(each.dtype).removeprefix("torch.")]
        for site, each in found.items()
    ]
    say("\n".join(table(rows)))
    if options.check:
        say(styled("sound: every value is what was written", "green"))
