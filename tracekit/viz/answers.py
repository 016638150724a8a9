"""Sweeps, head scores and integrated gradients: heat maps, and what is known of them."""

from __future__ import annotations

from collections.abc import Iterator

from tracekit.analysis import HeadScores, Integrated, Labelled, PatchSweep
from tracekit.viz.heat import heat_of, labelled_grid, largest, told_at
from tracekit.viz.parts import Facts, Grids, Part, Scale
from tracekit.viz.wording import brief

_KINDS = ("induction", "previous_token", "duplicate_token")
_FEW = 3  # patches that are named


def sweep_of(sweep: PatchSweep, panels: str | None) -> list[Part]:
    """How far each patch goes from one run to the other; the metric itself in the titles."""
    has_scale = sweep.base != sweep.other
    shown = sweep.normalised() if has_scale else sweep.values
    return [*heat_of(shown, panels=panels, beside=sweep.values), Facts(tuple(_told(sweep)))]


def _told(sweep: PatchSweep) -> Iterator[tuple[str, str]]:
    yield "metric, clean run", brief(sweep.clean)
    yield "metric, corrupted run", brief(sweep.corrupted)
    for number, cell in enumerate(sweep.top(_FEW)):
        share = ""
        if sweep.base != sweep.other:
            part = round(100 * (cell.value - sweep.base) / (sweep.other - sweep.base))
            share = f" ({part}% of the way)"
        name = "moves most" if not number else ""
        yield name, f"{told_at(sweep.axes, cell.place)}: {brief(cell.value)}{share}"
    yield "computed", f"{1 - sweep.saved:.0%} of the layer-tokens of whole forwards; {sweep.how}"
    off = f"off by {sweep.deviation:.1e} at most, in {sweep.checked} patches recomputed whole"
    yield "checked", off if sweep.checked else "no patch was recomputed whole"
    if not sweep.is_complete:
        yield "not complete", "cells without a number were not computed; resume= goes on"


def scores_of(scores: HeadScores) -> list[Part]:
    """Three maps, layer by head, side by side."""
    grids = tuple(labelled_grid(getattr(scores, kind), kind.replace("_", " ")) for kind in _KINDS)
    facts = [(kind.replace("_", " "), largest(getattr(scores, kind))) for kind in _KINDS]
    facts.append(("second copies foretold", f"{scores.copied:.0%}"))
    return [Grids(grids, Scale("sequential", 0.0, 1.0, "score")), Facts(tuple(facts))]


def integrated_of(found: Integrated) -> list[Part]:
    """The scores, and whether they are complete."""
    change = f"{brief(found.value)}, from {brief(found.baseline)} at the baseline"
    sums: Labelled = found.scores
    total = brief(float(sums.values.double().sum()))
    return [
        *heat_of(found.scores),
        Facts(
            (
                ("metric", change),
                ("sum of the scores", f"{total}, off by {found.error:.1e}, in {found.steps} steps"),
            )
        ),
    ]
