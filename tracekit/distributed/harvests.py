"""A harvest of a data set: in this process, in one of several, or on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """The activations of a data set at some sites, written into the directory `out`.

    What a site gives for each token becomes a row: `[rows, width]` of a residual stream,
    `[rows, heads, width of a head]` of `z`. Beside it stand the token, the number of its document
    and its position. The model runs without gradients, up to the last layer that is needed.

    `dataset`: texts, rows of token numbers, tokens `[documents, tokens]`, a file or several with a
    document in each line (.txt, .jsonl), a Hugging Face data set (its `column`: "text",
    "input_ids" or "tokens" where none is named), or anything else that can be gone through, with a
    `limit` of documents.
    `sites`: names ("resid_post", "layers.3.mlp_out"), patterns, a list of them, as `names_filter`
    of `run_with_cache` takes. They must have a value for each token.

    From documents to what the model reads: `context_size` tokens at most (None: what the model has
    room for, 1024 at most). A longer document goes on in a further context, which does not see the
    one before. `pack=True` fills contexts with documents one behind the other, parted by the
    end-of-sequence token; else each has contexts of its own, padded (padding is never kept).
    `prepend_bos`: None, as the tokenizer does. `batch_size` contexts are run at once.

    Kept are all `positions` of a context; "last", a number, a slice or numbers choose, and only
    those leave the device. `skip_special=True` drops the tokenizer's special tokens. What was
    dropped is counted: `activations.counts`. `dtype` (None: as the model computes, which is
    lossless) rounds, and values that don't fit are counted.

    A shard is a file of `shard_documents` documents (None: so many that it has about 64 MB),
    written whole or not at all. So a harvest may be killed at any moment: run again, it makes the
    shards that are missing. StorageError for a shard that is damaged or of another harvest (other
    weights, sites, documents, options), which `repair=True` makes again. `note` says what a
    fingerprint of the model can't see; a harvest with another note is another.

    Who makes which: `shards="2/8"` is this process' part as in an array job, every 8th shard from
    the 2nd (counted from 1, "1/8" to "8/8"); numbers are those shards (from 0). Processes under
    `torchrun` (RANK and WORLD_SIZE in the environment, or torch.distributed initialised) divide the
    shards, or the part, among themselves. `on="ray"` has `workers` do it, actors that hold the
    model: one for each GPU of the cluster if the model is on one, else one for as many processors
    as torch has threads here. What dies is started again, and its shard made again; Ray is started
    if it was not, and stopped then. The files are the same, byte for byte, whoever made them.

    Returns the activations of all shards, or of those that this process was to make; it waits for
    no other: `load_activations(out)` has all when all have ended. `progress=False`: no bar.
    """
    ranks = _ranks(model, on, workers)
    options: dict[str, Any] = {
        "context_size": context_size,
        "pack": pack,
        "prepend_bos": prepend_bos,
        "positions": positions,
        "skip_special": skip_special,
        "dtype": dtype,
        "batch_size": batch_size,
        "shard_documents": shard_documents,
        "column": column,
        "limit": limit,
        "note": note,
        "repair": repair,
    }
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
