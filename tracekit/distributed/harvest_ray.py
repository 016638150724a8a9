"""A harvest on Ray: actors that hold the model make a shard at a time, and are started again."""

# Guarantees:
#   - a worker makes shards of the very harvest that the driver planned, or refuses to begin;
#   - what a worker had in hand when it died is made again, by the one started in its place;
#   - Ray is left as it was found: not running if it was not.

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from tracekit.distributed.harvest_parcel import packed, unpacked
from tracekit.errors import InputError, StorageError, UnsupportedError
from tracekit.harvesting.harvest import Harvest
from tracekit.harvesting.progress import Progress
from tracekit.storage.activations import differences
from tracekit.storage.shards import Shard

RESTARTS: Final = 3  # of a worker, and as many more tries for the shard that it had in hand


@final
@dataclass(frozen=True)
class Recipe:
    """What a worker needs beside the model and the documents of a shard."""

    sites: tuple[str, ...]
    out: str
    options: Mapping[str, Any]
    spec: Mapping[str, Any]
    documents: int
    threads: int  # of torch, as in the driver
    device: str


@final
class Window:
    """The documents of one shard, at their places in a data set of which no others are here."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._first = 0
        self._rows: Sequence[Any] = ()

    def show(self, first: int, rows: Sequence[Any]) -> None:
        """From now on these are here, the first of them with the number `first`."""
        self._first, self._rows = first, rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice) -> Sequence[Any]:
        return self._rows[places.start - self._first : places.stop - self._first]


@final
class Worker:
    """Holds the model, and makes the shards that it is given; Ray makes an actor of it."""

    def __init__(self, parcel: Any, recipe: Recipe) -> None:
        torch.set_num_threads(recipe.threads)
        self._window = Window(recipe.documents)
        model = unpacked(parcel, recipe.device)
        self._harvest = Harvest(model, self._window, recipe.sites, recipe.out, **recipe.options)
        differing = differences(recipe.spec, self._harvest.spec)
        if differing:
            raise UnsupportedError(
                f"the model of a worker is another than that of the driver: {', '.join(differing)} "
                f"differ."
            )

    def make(self, number: int, documents: Sequence[Any]) -> int:
        """Make one shard of these documents; its number."""
        self._window.show(number * self._harvest.documents_of_shard, documents)
        self._harvest.run_shard(number)
        return number


def run_on_ray(
    harvest: Harvest,
    numbers: Sequence[int],
    options: Mapping[str, Any],
    workers: int | None,
    progress: bool,
) -> None:
    """Make these shards of `harvest`, but for those that are done; `options` are the harvest's."""
    sizes = {number: harvest.size_of(number) for number in numbers}
    with Progress(sum(sizes.values()), progress) as shown:
        left = [number for number in numbers if not harvest.is_done(number)]
        shown.skip(sum(sizes.values()) - sum(sizes[number] for number in left))
        if not left:
            return
        with _ray() as ray, _actors(ray, harvest, options, workers, len(left)) as actors:
            for number in _made(ray, harvest, left, actors):
                shown.see(_tokens_of(harvest, number))
                shown.finish(sizes[number])


def _made(ray: Any, harvest: Harvest, left: Sequence[int], actors: list[Any]) -> Iterator[int]:
    """The numbers of shards, as they are made; each actor has one in hand."""
    waiting = iter(left)
    running: dict[Any, Any] = {}

    def give(actor: Any) -> None:
        number = next(waiting, None)
        if number is not None:
            running[actor.make.remote(number, harvest.documents_in(number))] = actor

    for actor in actors:
        give(actor)
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        actor = running.pop(done)
        yield _result(ray, done)
        give(actor)


def _result(ray: Any, done: Any) -> int:
    """What a task gave. Its own error, if it raised one; UnsupportedError if its worker is lost."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayActorError as error:
        raise UnsupportedError(
            f"a worker of the harvest died, and so did those started in its place ({RESTARTS} at "
            f"most): {error} The shards that were made are there: run it again for the rest."
        ) from error


def _tokens_of(harvest: Harvest, number: int) -> int:
    """How many tokens the model read; StorageError if the shard is not there, or another's."""
    path = harvest.path_of(number)
    if not harvest.is_done(number):
        raise StorageError(
            f"a worker has written {path.name}, but not into {str(harvest.out)!r} as it is seen "
            f"here: out= has to be a directory that all machines of the cluster share."
        )
    counts = Shard(path).told.counts
    return counts.get("tokens", 0) + counts.get("separators", 0)


# -- Ray -------------------------------------------------------------------------------------------


@contextmanager
def _ray() -> Generator[Any]:
    """Ray, running: as it is, or started here and stopped again."""
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "on='ray' needs Ray, which is not installed: pip install \"tracekit[ray]\", or run the "
            "script under torchrun, or as an array job with shards='1/8'."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    ray.init(include_dashboard=False)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _actors(
    ray: Any, harvest: Harvest, options: Mapping[str, Any], workers: int | None, shards: int
) -> Generator[list[Any]]:
    """So many workers with the model, each on a device of its own; gone afterwards."""
    recipe = _recipe(harvest, options)
    has_gpus = recipe.device == "cuda"
    count = min(_count(ray.cluster_resources(), workers, has_gpus, recipe.threads), shards)
    kind = ray.remote(Worker).options(
        num_cpus=1,
        num_gpus=int(has_gpus),
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    parcel = ray.put(packed(harvest.model))
    actors = [kind.remote(parcel, recipe) for _ in range(count)]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _recipe(harvest: Harvest, options: Mapping[str, Any]) -> Recipe:
    own = {name: value for name, value in options.items() if name not in ("column", "limit")}
    return Recipe(
        harvest.sites.keys,
        str(harvest.out.absolute()),
        {**own, "shard_documents": harvest.documents_of_shard},
        harvest.spec,
        len(harvest.documents),
        torch.get_num_threads(),
        next(harvest.model.module.parameters()).device.type,
    )


def _count(there: Mapping[str, float], asked: int | None, has_gpus: bool, threads: int) -> int:
    """How many workers: one for each device, or for as many processors as torch has threads."""
    most = int(there.get("GPU" if has_gpus else "CPU", 0))
    count = max(1, most if has_gpus else most // threads) if asked is None else asked
    if not 1 <= count <= most:
        what = "GPUs" if has_gpus else "CPUs"
        raise InputError(f"workers={count}: Ray has {most} {what} here, and each worker takes one.")
    return count
