"""A harvest of a data set: in this process, in one of several, or on Ray."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from tracekit.capture import showing_own_lines
from tracekit.distributed.harvest_ray import run_on_ray
from tracekit.distributed.harvest_shares import Shards, Share, numbers_of, ranks_here
from tracekit.errors import InputError, UnsupportedError
from tracekit.harvesting.capture import Positions
from tracekit.harvesting.harvest import Harvest
from tracekit.models.language import LanguageModel
from tracekit.storage.activations import Activations, load_activations
from tracekit.storage.shards import Shard
from tracekit.tracing.wanted import Names

OPTIONS: Final = tuple(
    name
    for name, each in inspect.signature(Harvest).parameters.items()
    if each.kind is each.KEYWORD_ONLY
)


@showing_own_lines
def harvest(
    model: LanguageModel,
    dataset: Any,
    sites: Names,
    out: str | Path,
    *,
    context_size: int | None = None,
    pack: bool = False,
    prepend_bos: bool | None = None,
    positions: Positions = "all",
    skip_special: bool = False,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
    shard_documents: int | None = None,
    column: str | None = None,
    limit: int | None = None,
    note: str = "",
    repair: bool = False,
    shards: Shards = None,
    on: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Activations:
    """The activations of a data set at some sites, written into the directory `out`, in shards.

    The first block of arguments is explained by `tracekit.Harvest`: what the model reads, what is
    kept of it and with which loss, and what a shard is. A harvest may be killed at any moment; run
    again, it makes what is missing. The others say who makes which shards; the files are the same,
    byte for byte (with as many threads of torch):

    `shards="2/8"` is a part, as of an array job: every 8th from the 2nd (counted from 1, "1/8" to
    "8/8"). Numbers are those shards, from 0. Ranks under `torchrun` (RANK and WORLD_SIZE in the
    environment, or torch.distributed initialised) divide all shards, or the part, among themselves.
    `on="ray"`: `workers` do it, actors that hold the model (None: one for each GPU if the model is
    on one, else one for as many processors as torch has threads). One that dies is started again,
    and makes its shard again. Ray is started if it was not, and stopped then.

    Returns the activations of all shards, or of those that this process was to make; it waits for
    no other: `load_activations(out)` has all when all have ended. `progress=False`: no bar.
    """
    given = dict(locals())  # first, when there is nothing but the arguments
    options = {name: given[name] for name in OPTIONS}
    ranks = _ranks(model, on, workers)
    made = Harvest(model, dataset, sites, out, **options)
    numbers = numbers_of(shards, made.shards, ranks)
    if on is None:
        made.run(numbers, progress and ranks.first == 0)
    else:
        run_on_ray(made, numbers, options, workers, progress)
    is_all = len(numbers) == made.shards
    return load_activations(out) if is_all else _activations_of(made, numbers)


def _ranks(model: LanguageModel, on: str | None, workers: int | None) -> Share:
    """Which rank this is of how many; errors for what can't be combined."""
    if on not in (None, "ray"):
        raise InputError(f"on={on!r}: a harvest runs here (None), or on='ray'.")
    if on is None and workers is not None:
        raise InputError(f"workers={workers} are those of Ray: give on='ray' too.")
    ranks = ranks_here()
    if ranks.of > 1 and on is not None:
        raise InputError(
            f"this is rank {ranks.first} of {ranks.of} (torchrun), and each would start workers of "
            f"its own: harvest under torchrun, or on='ray'."
        )
    if any(type(weight).__name__ == "DTensor" for weight in model.module.parameters()):
        raise UnsupportedError(
            "the weights of this model are divided among ranks, which must run it together: a "
            "harvest gives each rank shards of its own. Load the whole model in each."
        )
    return ranks


def _activations_of(made: Harvest, numbers: Sequence[int]) -> Activations:
    return Activations(made.out, [Shard(made.path_of(number)) for number in numbers])
