"""`tracekit harvest`: the activations of a data set, written to disk."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tracekit.cli.opening import open_model, quiet_transformers
from tracekit.cli.output import say, say_json, styled
from tracekit.cli.status import FINE
from tracekit.distributed.harvests import harvest
from tracekit.errors import InputError, UnsupportedError
from tracekit.harvesting.harvest import Harvest, Plan
from tracekit.models.language import LanguageModel
from tracekit.storage.activations import Activations


def run(options: Namespace) -> int:
    """Harvest, and say what is there; with --plan only what there is to do."""
    with quiet_transformers():
        dataset = _dataset(options)
        model = open_model(options)
        if options.plan:
            _tell_plan(options, _planned(model, dataset, options))
            return FINE
        found = harvest(
            model,
            dataset,
            options.sites,
            options.out,
            **_of_harvest(options),
            shards=options.shards,
            on=options.on,
            workers=options.workers,
            progress=sys.stderr.isatty() and not options.json,
        )
    _tell(options, found)
    return FINE


def _planned(model: LanguageModel, dataset: Any, options: Namespace) -> Plan:
    return Harvest(model, dataset, options.sites, options.out, **_of_harvest(options)).plan()


def _of_harvest(options: Namespace) -> dict[str, Any]:
    """The options of a Harvest."""
    return {
        "context_size": options.context_size,
        "pack": options.pack,
        "prepend_bos": options.prepend_bos,
        "positions": _positions(options.positions),
        "skip_special": options.skip_special,
        "dtype": getattr(torch, options.save_as) if options.save_as else None,
        "batch_size": options.batch_size,
        "shard_documents": options.shard_documents,
        "column": options.column,
        "limit": options.limit,
        "note": options.note,
        "repair": options.repair,
    }


def _positions(text: str) -> Any:
    """ "all", "last", a number, "2:10" or "0,5,-1"."""
    if text in ("all", "last"):
        return text
    try:
        if ":" in text:
            return slice(*(int(part) if part else None for part in text.split(":")))
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--positions {text}: give all, last, a number, a range as 2:10, or numbers as 0,5."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


# -- the data set ----------------------------------------------------------------------------------


def _dataset(options: Namespace) -> Any:
    """Files of texts; a directory of a saved data set; or one of the Hub."""
    paths = [Path(name) for name in options.dataset]
    if all(path.is_file() for path in paths):
        return paths
    if len(paths) > 1:
        missing = next(path for path in paths if not path.is_file())
        raise InputError(f"there is no file {str(missing)!r}: of several, all must be files.")
    if not paths[0].is_dir() and paths[0].suffix in (".txt", ".jsonl"):
        raise InputError(f"there is no file {options.dataset[0]!r}.")
    return _of_hugging_face(options.dataset[0], options)


def _of_hugging_face(name: str, options: Namespace) -> Any:
    datasets = _datasets()
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, options.config)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name!r} can't be read as a data set: {first} Give files of texts (.txt, .jsonl), a "
            f"data set of the Hub, or a directory that save_to_disk wrote."
        ) from error
    if not isinstance(found, dict):
        return found
    if options.split not in found:
        raise InputError(f"--split {options.split}: {name!r} has {', '.join(map(str, found))}.")
    return found[options.split]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            "a data set that is no file is read by datasets, which is not installed: "
            'pip install "tracekit[datasets]".'
        ) from error
    return datasets


# -- what is said ----------------------------------------------------------------------------------


def _tell_plan(options: Namespace, plan: Plan) -> None:
    if options.json:
        counts = {"documents": plan.documents, "documents_of_shard": plan.documents_of_shard}
        told = {"out": options.out, **counts, "shards": plan.shards}
        say_json({**told, "done": list(plan.done), "left": list(plan.left)})
        return
    say(
        f"{plan.documents:,} documents in {plan.shards:,} shards of {plan.documents_of_shard:,}: "
        f"{len(plan.done):,} done, {len(plan.left):,} left"
    )


def _tell(options: Namespace, found: Activations) -> None:
    if options.json:
        told = {"out": options.out, "rows": found.rows, "sites": found.sites}
        say_json({**told, "counts": dict(found.counts)})
        return
    say(styled(f"{found.rows:,} rows of {len(found.sites)} sites in {options.out}", "bold"))
    say("  ".join(f"{count:,} {name}" for name, count in found.counts.items()))
