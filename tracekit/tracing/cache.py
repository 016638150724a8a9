"""A Cache holds recorded activations by path, in the order of execution; no model, no hooks."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, final
from weakref import ReferenceType

from tracekit.capture import showing_own_lines
from tracekit.core.site import Site, Slot
from tracekit.errors import CacheError, UnknownModuleError, UnknownPathError, did_you_mean
from tracekit.interleave.duties import Span
from tracekit.tracing.again import with_last
from tracekit.tracing.cache_parts import Parts, What, write_whole
from tracekit.tracing.changes import Changes
from tracekit.tracing.entries import Entries, Entry
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.sequence import TokenSequence, calls_in_forwards, stitch
from tracekit.tracing.spool import Spool
from tracekit.tracing.timeline import Timeline
from tracekit.tracing.verify import Verification, verify


class Filling(Protocol):
    """Whoever fills a cache (a Recorder)."""

    spool: Spool | None  # writes it as it comes
    timeline: Timeline

    @property
    def span(self) -> Span | None:
        """Of the rows that are recorded; None: all."""
        ...

    def asked(self) -> list[str]:
        """Everything that is to be recorded."""
        ...

    def list_so_far(self) -> None:
        """Put what was recorded until now into the cache, safe from what the model does next."""
        ...


class Recorded(NamedTuple):
    """What a cache takes: the entries by path, other names of paths, what was to be recorded, and
    how the run went."""

    entries: dict[str, list[Entry]]
    aliases: dict[str, str]
    asked: list[str]
    changes: Changes


@final
class Cache(Mapping[str, Entries]):
    """Recorded activations: `cache["model.transformer.h.0"]`, or `cache.model.transformer.h[0]`.

    Filled by hooks while the model runs; complete, and frozen, when the trace has ended. That of a
    stream can be read between two items, too: it has the entries so far.
    """

    _filling: ReferenceType[Filling] | None = None  # until it is complete
    _is_standing: Callable[[], bool] | None = None  # the model, so that it can be read
    _parts: Parts | None = None  # the files that it is in

    def __init__(self) -> None:
        self._entries: dict[str, list[Entry]] = {}
        self._aliases: dict[str, str] = {}
        self._asked: list[str] = []
        self._changes = Changes(Timeline())
        self._root = ""
        self._is_complete = False

    def _freeze(self, recorded: Recorded) -> None:
        """Take what was recorded; a Recorder calls this once, at the end of its run."""
        self._show(recorded)
        self._is_complete = True
        self._filling = self._is_standing = None

    def _show(self, recorded: Recorded) -> None:
        """Take what was recorded so far."""
        self._entries, self._aliases, self._asked, self._changes = recorded
        self._root = next(iter(self._asked), "").partition(".")[0]

    def _open_early(self, is_standing: Callable[[], bool]) -> None:
        """Let it be read while it is filled, whenever the model stands still."""
        self._is_standing = is_standing

    def _mapped(self, change: Callable[[Entry], Entry | None]) -> Cache:
        """A complete cache with other entries; those of which `change` makes None are left out."""
        self._check_readable("its entries")
        changed = {path: list(map(change, found)) for path, found in self._entries.items()}
        entries = {
            path: [each for each in found if each is not None] for path, found in changed.items()
        }
        entries = {path: found for path, found in entries.items() if found}
        other = Cache()
        other._freeze(Recorded(entries, self._aliases, self._asked, self._changes))
        return other

    # -- by key ---------------------------------------------------------------------------------

    def __getitem__(self, path: str | Envoy) -> Entries:
        """By full path, by path without the root's name, or by the Envoy itself.

        UnknownPathError for what is not in it, CacheError while the trace runs.
        """
        if isinstance(path, Envoy):
            path = path.path
        self._check_readable(repr(path))
        for key in (path, f"{self._root}.{path}"):
            found = self._entries.get(self._aliases.get(key, key))
            if found is not None:
                return Entries(key, found if self._is_complete else found[:])
        if not {path, f"{self._root}.{path}"}.isdisjoint(self._asked):
            ended = "the run ended before the module was called"
            why = ended if self._is_complete else "the module has not been called so far"
            raise UnknownPathError(f"{path!r} was to be recorded, but {why}")
        known = [*self._entries, *(way for way, of in self._aliases.items() if of in self._entries)]
        raise UnknownPathError(f"{path!r} is not in this cache{did_you_mean(path, known)}")

    def __iter__(self) -> Iterator[str]:
        self._check_readable("its keys")
        return iter(self._entries)

    def __len__(self) -> int:
        self._check_readable("its length")
        return len(self._entries)

    def __bool__(self) -> bool:
        return self._is_hidden or bool(self._entries)

    def _check_readable(self, what: str) -> None:
        if self._is_hidden:
            raise CacheError(
                f"the cache is complete when the trace has ended: read {what} after the block, "
                f"or ask for a module's .output in it."
            )
        filling = self._filling() if self._filling is not None else None
        if filling is not None:
            filling.list_so_far()

    def _check_complete(self, what: str) -> None:
        if not self._is_complete:
            raise CacheError(f"{what} runs the model again: ask for it when the run has ended.")

    @property
    def _is_hidden(self) -> bool:
        """Whether it can't be read now."""
        return not self._is_complete and (self._is_standing is None or not self._is_standing())

    # -- by token -------------------------------------------------------------------------------

    def sequence(
        self,
        path: str | Envoy,
        of: Literal["output", "input"] = "output",
        *,
        call: int | None = None,
        include_last: bool = False,
        partial: bool = False,
        flat: bool = False,
    ) -> TokenSequence:
        """What a module gave for each token of the sequences: `[batch, positions, ...]`.

        Of a generation, the steps put together: prompt and all new tokens but the last, which the
        model never went over. A tensor, with `.tokens`, `.positions` and `.valid`, each
        `[batch, positions]`. Each position is from the forward that came to it first; what was
        drafted and rejected is left out; a row follows its beam. Of a tuple it is the first tensor,
        as `.hidden`; `of="input"` takes the first input. `include_last=True` runs the model once
        more, for the last token. `call` names one of several calls of the
        module in each forward; `flat=True` says of values with rows and positions in one axis (a
        router's) that they are in it row by row.

        CacheError for what has no value for each token; and for what lacks some, unless
        `partial=True`: `.positions` tells which there are.
        """
        entries = self[path]
        if of not in ("output", "input"):
            raise CacheError(f"of= is 'output' or 'input', not {of!r}.")
        chosen = entries if call is None else calls_in_forwards(entries, call)
        values = [entry.output if of == "output" else entry.input for entry in chosen]
        timeline = self._changes.timeline
        found = stitch(chosen, values, timeline, is_partial=partial, is_flat=flat)
        if not include_last:
            return found
        self._check_complete("include_last=True")
        site = Site(chosen[0].path, Slot.OUTPUT if of == "output" else Slot.INPUT)
        return with_last(found, site, call or 0, self._changes)

    def verify(self, tolerance: float | None = None) -> Verification:
        """Whether what was recorded while the model generated is what one forward computes.

        The model runs once over the final tokens, with the run's edits made again at the absolute
        positions where they were made, and each site is compared with what was recorded. True if
        all agree; shows as a table: site, largest deviation, where, verdict. `tolerance` is of the
        largest value of a site; by default it is that of the dtype (float32 1e-5, bfloat16 2e-2).

        CacheError if the run can't be made again: the model is gone, or an edit was of a kind that
        belongs to no position.
        """
        self._check_complete("verify()")
        return verify(self._entries, self._changes, tolerance)

    @showing_own_lines
    def save(self, path: str | Path) -> None:
        """Write it to a folder of safetensors files, for `tracekit.load_cache(path)`.

        Nothing is lost but the graph of tensors that have one, and gaps between their numbers;
        what can't be written is refused (UnsupportedError), and leaves nothing behind. In the place
        of a cache it is written over that, once it is complete; StorageError for anything else
        that is there. To write a long generation while it runs: `tracer.cache(path=...)`.
        """
        self._save(path)

    def _save(self, path: str | Path, names: Any = None) -> None:
        if not self._is_complete:
            raise CacheError(
                "a cache is saved when its run has ended; tracer.cache(path=...) writes one while "
                "it runs."
            )
        what = What(self._root, self._asked, self._aliases, self._changes.span, names)
        entries = (entry for found in self._entries.values() for entry in found)
        write_whole(path, entries, what, self._changes)

    # -- by attribute ---------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while a Cache is being unpickled
            raise AttributeError(name)
        self._check_readable(repr(name))
        return _child(self, "", name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(() if self._is_hidden else _names_below(self, ""))})

    # -- for people -----------------------------------------------------------------------------

    def __repr__(self) -> str:
        if self._is_hidden:
            return "Cache(recording until the trace ends)"
        count = sum(map(len, self._entries.values()))
        where = "" if self._parts is None else f"; {self._parts}"
        head = f"Cache({len(self)} modules, {count} entries{where})"
        rows = [f"  {path}: {_summary(found)}" for path, found in self._shown()]
        more = [f"  … {len(self) - len(rows)} more"] if len(self) > len(rows) else []
        return "\n".join([head, *rows, *more])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td style='text-align:left'><code>{html.escape(path)}</code></td>"
            f"<td>{len(found)}</td>"
            f"<td style='text-align:left'>{html.escape(_summary(found))}</td></tr>"
            for path, found in self.items()
        )
        return (
            f"<div style='max-height:24em;overflow:auto'><table><thead><tr>"
            f"<th style='text-align:left'>Cache: {len(self)} modules</th><th>entries</th>"
            f"<th style='text-align:left'>recorded</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )

    def _shown(self) -> list[tuple[str, Entries]]:
        return list(self.items())[:12]


def empty_cache() -> Cache:
    """The complete cache of a run that recorded nothing."""
    cache = Cache()
    cache._freeze(Recorded({}, {}, [], Changes(Timeline())))  # pyright: ignore[reportPrivateUsage] - same file
    return cache


@final
class Branch:
    """A place on the way to recorded modules: `cache.model.transformer`."""

    __slots__ = ("_cache", "_path")

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache = cache
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = self._cache.get(self._path)
        if found is not None and hasattr(Entries, name):
            return getattr(found, name)
        return _child(self._cache, self._path, name)

    def __getitem__(self, index: int | str) -> Any:
        """The place below by index, as in a list of modules; an Entry where none is numbered."""
        names = _names_below(self._cache, self._path)
        if isinstance(index, str) or str(index) in names:
            return _child(self._cache, self._path, str(index))
        numbers = sorted(int(name) for name in names if name.isdigit())
        found = self._cache.get(self._path)
        if found is not None and not numbers:
            return found[index]
        if index < 0 and -index <= len(numbers):
            return _child(self._cache, self._path, str(numbers[index]))
        raise IndexError(f"{self._path}[{index}] is not in this cache; it has {names}.")

    def __iter__(self) -> Iterator[Any]:
        names = _names_below(self._cache, self._path)
        if any(name.isdigit() for name in names):
            return iter([_child(self._cache, self._path, name) for name in names if name.isdigit()])
        return iter(self._cache[self._path])

    def __len__(self) -> int:
        found = self._cache.get(self._path)
        return len(found) if found is not None else len(_names_below(self._cache, self._path))

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *_names_below(self._cache, self._path)})

    def __repr__(self) -> str:
        found = self._cache.get(self._path)
        return (
            repr(found)
            if found is not None
            else f"{self._path}: {_names_below(self._cache, self._path)}"
        )


def _child(cache: Cache, path: str, name: str) -> Branch:
    full = f"{path}.{name}" if path else name
    names = _names_below(cache, path)
    if name not in names:
        raise UnknownModuleError(
            f"{full!r} is not in this cache{did_you_mean(name, names)} (there: {names[:8]})"
        )
    return Branch(cache, full)


def _names_below(cache: Cache, path: str) -> list[str]:
    prefix = f"{path}." if path else ""
    paths = [*cache, *cache._aliases]  # pyright: ignore[reportPrivateUsage] - same file
    return list(
        dict.fromkeys(p[len(prefix) :].partition(".")[0] for p in paths if p.startswith(prefix))
    )


def _summary(entries: Entries) -> str:
    first = entries[0]
    text = repr(first).removeprefix("Entry(").removesuffix(")")
    return text if len(entries) == 1 else f"{text}; … {len(entries)} entries"
