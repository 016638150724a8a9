"""Refuse a run in which something that a block had read was overwritten later."""

from __future__ import annotations

from tracekit.core.versions import Versions
from tracekit.errors import OverwrittenError


def check_versions(versions: Versions, has_grad: bool) -> None:
    """OverwrittenError, with what can be done, for what a block still holds."""
    for label in versions.overwritten():
        # Who holds the memory can't be told: a module that works in place returns the very
        # tensor that it was given, and keeps it for the backward pass.
        others = [f"as {other}" for other in versions.sharing(label)]
        holders = [*others, *(["for a backward pass"] if has_grad else [])]
        cures = ["take .clone() of that, too"] if others else []
        cures += ["trace under torch.no_grad()"] if has_grad else []
        more = " If you did: the memory is still in use {}; {}.".format(
            " and ".join(holders), ", and ".join(cures)
        )
        raise OverwrittenError(
            f"{label} was overwritten in place after the block had read it, by the model or "
            f"by a later edit of a value that shares its memory: take {label.site}.clone() "  # pyright: ignore[reportAttributeAccessIssue] - labels are visits
            f"where you read it.{more if holders else ''}"
        )
