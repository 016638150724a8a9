"""Read the folder of a cache again: its entries, whose values are read when they are asked for."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from tracekit.architectures import Spelling
from tracekit.core.files import TensorFile
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, StorageError, UnsupportedError
from tracekit.interleave.duties import Span
from tracekit.tracing.cache import Cache, Recorded
from tracekit.tracing.cache_parts import BEGIN, END, FORMAT, Parts, held, name_of
from tracekit.tracing.changes import Change, Changes, How
from tracekit.tracing.entries import Entry
from tracekit.tracing.named_cache import NamedCache
from tracekit.tracing.packing import Unpacker
from tracekit.tracing.timeline import Pass, Timeline, Transcript


class Read(NamedTuple):
    """A cache from a folder, and of which model it is: class, weights and first part of paths."""

    cache: Cache | NamedCache
    store: Cache
    model: str | None
    weights: str | None
    root: str


def read_cache(folder: Path, *, partial: bool) -> Read:
    """The cache in `folder`; StorageError if it is damaged, or is not whole and not `partial`."""
    if not folder.is_dir():
        raise StorageError(f"there is no folder {str(folder)!r}: give one that a cache is in.")
    begin = TensorFile(folder / BEGIN, FORMAT).described
    parts = Parts(folder, begin["run"])
    store = Cache()
    reading = _Reading(parts, store)
    end = parts.open(END) if (folder / END).exists() else None
    found = list(reading.files(None if end is None else end.described["parts"]))
    for file in found:
        reading.add(file)
    if end is not None:
        reading.finish(end)
    elif not partial:
        raise _not_whole(folder, reading.steps, len(found))
    aliases = begin["aliases"] if end is None else end.described["aliases"]
    changes = reading.changes
    if begin["span"] is not None:
        changes = changes.narrowed(Span(*begin["span"]))
    store._freeze(Recorded(reading.entries, dict(aliases), begin["asked"], changes))
    store._parts = parts
    cache = store if begin["names"] is None else _named(store, begin["names"])
    return Read(cache, store, begin["model"], begin["weights"], begin["root"])


@final
class _Reading:
    """Puts a cache together, a file at a time."""

    def __init__(self, parts: Parts, store: Cache) -> None:
        self.entries: dict[str, list[Entry]] = {}
        self.timeline = Timeline()
        self.changes = Changes(self.timeline)
        self.steps = 0
        self._parts = parts

    def files(self, count: int | None) -> Iterator[TensorFile]:
        """The parts in order: so many, or those that are there."""
        folder = self._parts.folder
        there = len(list(folder.glob("part-*.safetensors"))) if count is None else count
        for part in range(there):
            file = self._parts.open(name_of(part))
            if file.described.get("part") != part:
                raise StorageError(
                    f"{str(file.path)!r} is part {file.described.get('part')} of its cache, under "
                    f"the name of another: rename it {name_of(file.described.get('part') or 0)}."
                )
            yield file

    def add(self, file: TensorFile) -> None:
        """Take the entries of a part."""
        told = file.described
        part, paths = told["part"], told["paths"]
        self._go_on(file)
        self._parts.add(part, file)
        for where, step, call, place, *packed in told.pop("entries"):
            during = None if place is None else self.timeline.passes[place]
            inputs, output, grad = (held(self._parts, part, each) for each in packed)
            entry = Entry(paths[where], step, call, inputs, output, grad, during)
            self.entries.setdefault(entry.path, []).append(entry)
            self.steps = max(self.steps, step)

    def finish(self, end: TensorFile) -> None:
        """Take how the run ended."""
        told = end.described
        self._parts.add(told["part"], end)
        self._go_on(end)
        unpack = Unpacker(told["part"], self._parts.find).value
        if told["rerun"] is not None:
            self.timeline.rerun = FromFile(told["rerun"], unpack, self._parts.folder)
        passes = self.timeline.passes
        self.changes.later = lambda: [_change(each, passes, unpack) for each in told["changes"]]
        self.changes.missed = unpack(told["missed"])

    def _go_on(self, file: TensorFile) -> None:
        """The forwards and steps since, and all tokens until then."""
        timeline, told = self.timeline, file.described
        for step, rows, start, length, kept, is_main in told["passes"]:
            place = len(timeline.passes)
            timeline.passes.append(Pass(place, step, rows, start, length, kept, is_main))
        timeline.lengths += told["lengths"]
        timeline.prompt = told["prompt"]
        timeline.is_generation = told["is_generation"]
        timeline.is_behind_prefix = told["is_behind_prefix"]
        if told["transcript"] is not None:
            self._parts.add(told["part"], file)
            *packed, prompt, batch = told["transcript"]
            unpack = Unpacker(told["part"], self._parts.find).value
            tokens, is_real, lineage = map(unpack, packed)
            timeline.transcript = Transcript(tokens, is_real, prompt, lineage, batch)


@final
class FromFile:
    """In the place of what runs the model again: the model is not at hand."""

    def __init__(self, told: Mapping[str, Any], unpack: Callable[[Any], Any], folder: Path) -> None:
        self.why: str | None = told.get("why")  # it can't be run again from a file
        self._told = told
        self._unpack = unpack
        self._folder = folder

    def told(self) -> dict[str, Any]:
        """What it runs on; UnsupportedError if the file does not tell."""
        if self.why is not None:
            raise UnsupportedError(self.why)
        return self._unpack(self._told["given"])

    @property
    def tree(self) -> Tree:
        """CacheError, which says how to have the model."""
        if self.why is not None:
            raise CacheError(
                f"this cache is from a file, which can't hold all of its run: {self.why}."
            )
        raise CacheError(
            f"this cache is from a file, and its model would have to run again: give it, as in "
            f"tracekit.load_cache({str(self._folder)!r}, model=model)."
        )

    def __call__(self, transcript: Transcript, include_last: bool) -> None:
        """CacheError."""
        assert self.tree


def _change(told: Any, passes: list[Pass], unpack: Any) -> Change:
    site, place, step, call, leaf, how, value, before = told
    during = None if place is None else passes[place]
    return Change(unpack(site), during, step, call, leaf, How[how], unpack(value), unpack(before))


def _named(store: Cache, told: Any) -> NamedCache:
    names = Unpacker(0, _no_tensor).value(told)
    return NamedCache(
        store,
        {spot.key: spot for spot in names["spots"]},
        Spelling(names["lengths"]),
        has_batch=names["has_batch"],
        is_of_gradients=names["is_of_gradients"],
    )


def _no_tensor(_: object) -> torch.Tensor:
    raise AssertionError("names have no tensors")


def _not_whole(folder: Path, steps: int, parts: int) -> StorageError:
    came = f"it came to step {steps}, in {parts} parts" if parts else "nothing of it was finished"
    return StorageError(
        f"the cache in {str(folder)!r} was not written to its end: {came}. "
        f"tracekit.load_cache({str(folder)!r}, partial=True) reads what there is."
    )
