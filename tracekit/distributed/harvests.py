"""A harvest of a data set, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tracekit.capture import showing_own_lines
from tracekit.harvesting.harvest import Harvest
from tracekit.models.language import LanguageModel
from tracekit.storage.activations import Activations, load_activations
from tracekit.tracing.wanted import Names


@showing_own_lines
def harvest(
    model: LanguageModel,
    dataset: Any,
    sites: Names,
    out: str | Path,
    *,
    shards: Iterable[int] | None = None,
    progress: bool = True,
    **options: Any,
) -> Activations:
    """The activations of a data set at some sites, written into the directory `out`."""
    made = Harvest(model, dataset, sites, out, **options)
    made.run(shards, progress)
    return load_activations(out, partial=shards is not None)
