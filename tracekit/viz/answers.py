"""What analysis answers, from sweeps to edges, as maps and tables, with what is known of it."""

from __future__ import annotations

from collections.abc import Iterator

from tracekit.analysis import (
    Circuit,
    DoseCurve,
    Edges,
    HeadScores,
    Integrated,
    Labelled,
    PatchSweep,
    Probes,
)
from tracekit.viz.heat import heat_of, labelled_grid, largest, told_at
from tracekit.viz.parts import Facts, Grids, Item, Part, Scale, Table, scale_of
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


def doses_of(curve: DoseCurve) -> list[Part]:
    """The metric by layer and scale, and below it what that costs."""
    costs = labelled_grid(curve.divergence, curve.divergence.what)
    scale = scale_of(curve.divergence.values.flatten().tolist(), "")
    return [*heat_of(curve.metric), Grids((costs,), scale)]


def probes_of(probes: Probes) -> list[Part]:
    """The accuracy of each probe, beside that on shuffled labels."""
    each = (probes.accuracy, probes.control)
    grids = tuple(labelled_grid(one, one.what) for one in each)
    classes = ", ".join(map(str, probes.classes))
    told = f"{classes}; chance is {1 / len(probes.classes):.0%}"
    facts = (("classes", told), ("prompts", str(len(probes.folds))))
    return [Grids(grids, Scale("sequential", 0.0, 1.0, "accuracy")), Facts(facts)]


def edges_of(found: Edges | Circuit) -> list[Part]:
    """The edges with the largest scores, as a table."""
    edges = found.edges if isinstance(found, Circuit) else found.top()
    rows = tuple(
        (Item(edge.source, "code"), Item(edge.target, "code"), Item(f"{edge.score:+.3g}", "number"))
        for edge in edges
    )
    return [Table(("from", "to", "score"), rows)]
