"""A cache as a folder of files: what it is of, its entries in parts, and how its run ended."""

# begin.safetensors        the model, what was to be recorded, and under which names
# part-00000.safetensors   entries, in order; their tensors; the forwards and tokens until then
# end.safetensors          how many parts there are, the tokens, and what was edited
#
# Each file is there whole or not at all, says what it holds, and has the key of its run. Where the
# last one is missing a run was killed: what there is is right, and it is told how far it came.

# pyright: reportPrivateUsage=false

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, final
from weakref import WeakValueDictionary

from safetensors import SafetensorError
from torch import Tensor

from tracekit.core.files import TensorFile, flush, write_tensors
from tracekit.core.fingerprint import fingerprint
from tracekit.errors import StorageError, UnsupportedError
from tracekit.interleave.duties import Span
from tracekit.tracing.changes import Changes
from tracekit.tracing.entries import ABSENT, Entry, Later
from tracekit.tracing.packing import Packer, Unpacker
from tracekit.tracing.shelf import Place, Shelf
from tracekit.tracing.timeline import Timeline

FORMAT: Final = "tracekit cache 1"
BEGIN: Final = "begin.safetensors"
END: Final = "end.safetensors"
PART_BYTES = 256 << 20  # of tensors in one file, and more only if one tensor has more
_STACKS: Final = 20_000  # tensors in one file: what is told of them has room for some 100 MB
_ENTRIES: Final = 50_000


def name_of(part: int) -> str:
    """The name of the file of a part."""
    return f"part-{part:05d}.safetensors"


class What(NamedTuple):
    """What a cache is of, known before its run: `names`, packed, are those of a NamedCache."""

    root: str  # the first part of every path
    asked: list[str]
    aliases: Mapping[str, str]
    span: Span | None  # of the rows of one block
    names: Any = None


@final
class Parts:
    """The parts of one cache on the disk, each opened when something of it is asked for."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder
        self.run = run
        self._files: dict[int, TensorFile] = {}
        self._held: WeakValueDictionary[Place, Tensor] = WeakValueDictionary()

    def open(self, name: str) -> TensorFile:
        """A file of this cache; StorageError if it is damaged, or of another."""
        file = TensorFile(self.folder / name, FORMAT)
        if file.described["run"] != self.run:
            raise StorageError(
                f"{str(file.path)!r} is of another cache than the other files in its folder: put "
                f"back the one that belongs there."
            )
        return file

    def add(self, part: int, file: TensorFile) -> None:
        """Keep a part that was opened."""
        self._files[part] = file

    def find(self, place: Place) -> Tensor:
        """The memory at a place, proved: the same tensor as long as somebody has it."""
        held = self._held.get(place)
        if held is None:
            file, name = self._at(place)
            held = file.rows(name, slice(place.row, place.row + 1))[0]
            self._held[place] = held
        return held

    def look(self, place: Place) -> Tensor:
        """The memory at a place as it lies in the file, for its shape."""
        file, name = self._at(place)
        return file.look(name)[place.row]

    def value(self, part: int, packed: Any) -> Any:
        """What was packed into a part."""
        return Unpacker(part, self.find).value(packed)

    def __str__(self) -> str:
        nbytes = sum(each.stat().st_size for each in self.folder.glob("*.safetensors"))
        is_whole = (self.folder / END).exists()
        told = f"{_size(nbytes)} in {str(self.folder)!r}"
        return told if is_whole else f"{told}, without the end of its run"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of a cache is in memory

    def _at(self, place: Place) -> tuple[TensorFile, str]:
        file = self._files.get(place.part)
        if file is None:
            file = self._files[place.part] = self.open(name_of(place.part))
            file.described.pop("entries", None)
        return file, file.described["stacks"][place.stack]


@final
class OfPart(Later):
    """A value that lies in a part."""

    __slots__ = ("_packed", "_part", "_parts")

    def __init__(self, parts: Parts, part: int, packed: Any) -> None:
        self._parts = parts
        self._part = part
        self._packed = packed

    def read(self) -> Any:
        """The value; StorageError if the file is damaged."""
        return self._parts.value(self._part, self._packed)

    def look(self) -> Any:
        """The value as it lies in the file."""
        return Unpacker(self._part, self._parts.look).value(self._packed)


def held(parts: Parts, part: int, packed: Any) -> Any:
    """What an Entry holds of a value that was packed."""
    is_absent = type(packed) is dict and "absent" in packed
    return ABSENT if is_absent else OfPart(parts, part, packed)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} bytes"


# -- write ----------------------------------------------------------------------------------------


@final
class PartWriter:
    """Writes entries into a folder, part by part; `keeps` says that they stay in memory, too."""

    def __init__(self, folder: Path, what: What, timeline: Timeline, *, keeps: bool) -> None:
        self.parts = Parts(folder, secrets.token_hex(8))
        self._keeps = keeps
        self._timeline = timeline
        self._told = (0, 0)  # forwards and steps of the timeline that were written
        self._shelf = Shelf()
        self._packer = Packer(self._shelf)
        self._entries: list[tuple[Entry, list[Any]]] = []
        model = None if timeline.model is None else timeline.model()
        begin = {
            **what._asdict(),
            "aliases": list(what.aliases.items()),
            "span": None if what.span is None else list(what.span),
            "model": None if model is None else type(model).__name__,
            "weights": None if model is None else fingerprint(model),
        }
        self._write(BEGIN, begin)

    def add(self, entries: Iterable[Entry]) -> None:
        """Write entries: all but the last of them, which wait for `flush`.

        UnsupportedError for what can't be written.
        """
        for entry in entries:
            when = f"step {entry.step}" + (f", call {entry.call}" if entry.call else "")
            packed = [
                self._packer.of_visit(value, f"{entry.path}.{slot}", when)
                for slot, value in _values(entry).items()
            ]
            self._entries.append((entry, packed))
            if self._is_full():
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._entries:
            return
        part, paths = self._shelf.part, dict[str, int]()
        told = [
            [
                paths.setdefault(entry.path, len(paths)),
                entry.step,
                entry.call,
                None if entry.during is None else entry.during.place,
                *packed,
            ]
            for entry, packed in self._entries
        ]
        content = {"part": part, "entries": told, "paths": list(paths)}
        lengths = self._write(name_of(part), {**content, **self._of_timeline()})
        for entry, packed in () if self._keeps else self._entries:
            values = (held(self.parts, part, each) for each in packed)
            entry._inputs, entry._output, entry._grad = values
        self._entries.clear()
        self._shelf.clear()
        self._told = lengths

    def end(self, changes: Changes, aliases: Mapping[str, str]) -> None:
        """Write what is left, and that this was all."""
        self.flush()
        count = self._shelf.part
        packed = _packed_changes(changes, self._packer)
        content = {"part": count, "parts": count, "aliases": list(aliases.items()), **packed}
        self._write(END, {**content, **self._of_timeline()})
        self._shelf.clear()

    def _is_full(self) -> bool:
        shelf = self._shelf
        return (
            shelf.nbytes >= PART_BYTES
            or len(shelf.names) >= _STACKS
            or len(self._entries) >= _ENTRIES
        )

    def _of_timeline(self) -> dict[str, Any]:
        """What a part tells of the run so far: the forwards and steps that are new, all tokens."""
        timeline, (passes, steps) = self._timeline, self._told
        transcript = timeline.transcript
        tokens = None
        if transcript is not None:
            fields = (transcript.tokens, transcript.is_real, transcript.lineage)
            tokens = [self._packer.value(each, "tokens") for each in fields]
            tokens += [transcript.prompt, transcript.batch]
        return {
            "passes": [list(each[1:]) for each in timeline.passes[passes:]],
            "lengths": timeline.lengths[steps:],
            "transcript": tokens,
            "prompt": timeline.prompt,
            "is_generation": timeline.is_generation,
            "is_behind_prefix": timeline.is_behind_prefix,
        }

    def _write(self, name: str, content: dict[str, Any]) -> tuple[int, int]:
        path = self.parts.folder / name
        lengths = (len(self._timeline.passes), len(self._timeline.lengths))
        told = {"format": FORMAT, "run": self.parts.run, "stacks": self._shelf.names, **content}
        try:
            write_tensors(path, self._shelf.tensors(), told)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise StorageError(f"{str(path)!r} can't be written: {reason}.") from error
        return lengths


def _values(entry: Entry) -> dict[str, Any]:
    values = {"inputs": entry._inputs, "output": entry._output, "grad": entry._grad}
    return {name: v.read() if isinstance(v, Later) else v for name, v in values.items()}


def _packed_changes(changes: Changes, packer: Packer) -> dict[str, Any]:
    """What was edited, and what was given: enough to make the run again with its model."""
    whole = changes.whole
    made = [
        [
            packer.value(change.site, ""),
            None if change.during is None else change.during.place,
            *change[2:5],
            change.how.name,
            packer.of_visit(change.value, f"{change.site} as it was edited", f"step {change.step}"),
            packer.of_visit(change.before, f"{change.site} before", f"step {change.step}"),
        ]
        for change in whole.made
    ]
    return {
        "changes": made,
        "missed": packer.of_visit(whole.missed, "", ""),
        "rerun": _packed_rerun(whole, packer),
    }


def _packed_rerun(changes: Changes, packer: Packer) -> Any:
    if changes.timeline.rerun is None:
        return None
    try:
        for edit in changes.at_positions:
            raise UnsupportedError(f"{edit.site}.at({edit.chosen!r}) is a function of the block")
        return {"given": packer.of_visit(changes.timeline.rerun.told(), "given", "")}
    except UnsupportedError as error:
        return {"why": str(error.args[0])}


def write_whole(path: str | Path, entries: Iterable[Entry], what: What, changes: Changes) -> None:
    """Write a cache to a folder, in the place of one that is there, or leave all as it was."""
    folder = Path(path)
    if not _is_cache(folder):
        check_free(folder)
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        beside.mkdir(parents=True)
        writer = PartWriter(beside, what, changes.whole.timeline, keeps=True)
        writer.add(entries)
        writer.end(changes, what.aliases)
        if _is_cache(folder):
            shutil.rmtree(folder)
        beside.replace(folder)
        flush(folder.parent)
    except OSError as error:
        raise StorageError(f"{str(path)!r} can't be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_free(folder: Path) -> None:
    """StorageError if there is something at `folder` that would be written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(
            f"there is something at {str(folder)!r} already, which is not written over: name "
            f"another folder, or delete it."
        )


def _is_cache(folder: Path) -> bool:
    """Whether it is the folder of a cache, and has nothing else."""
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    parts = [name for name in names if name.startswith("part-") or name in (BEGIN, END)]
    return BEGIN in names and parts == names
