"""Begin to record what `tracer.cache()` asks for, in memory or into a folder."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tracekit.core.keep import Keep
from tracekit.core.tree import Tree
from tracekit.errors import CacheError
from tracekit.tracing.cache import Cache
from tracekit.tracing.cache_parts import PartWriter, What, check_free
from tracekit.tracing.execution import Execution
from tracekit.tracing.named_cache import NamedCache, record_named
from tracekit.tracing.select import Selector
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.spool import Spool
from tracekit.tracing.wanted import Names, wanted


class Asked(NamedTuple):
    """What a user asks for: modules, or names; what of them; and where it goes."""

    modules: Selector | None
    names: Names | None
    pos_slice: PosSlice
    keep: Keep
    inputs: bool
    outputs: bool
    grads: bool
    path: str | Path | None


def record(
    execution: Execution, tree: Tree, asked: Asked, invoke: int | None
) -> Cache | NamedCache:
    """The cache, which is filled from now on; CacheError for what can't be."""
    keep, grads = asked.keep, asked.grads
    folder = None if asked.path is None else _folder(asked.path, keep, grads)
    if asked.names is not None:
        spots = wanted(tree, asked.names, "names=")
        named = record_named(
            execution, tree, spots, keep, asked.pos_slice, has_grads=grads, invoke=invoke
        )
        if folder is not None:
            _spool(named._store, folder, tree, named._names_for_a_file())
        return named
    if asked.pos_slice is not None:
        raise CacheError("pos_slice= is of activations by name: give names=, too.")
    if not (asked.inputs or asked.outputs or grads):
        raise CacheError("include_output=False and include_inputs=False record nothing.")
    cache = execution.record(asked.modules, keep, asked.inputs, asked.outputs, grads, invoke)
    if folder is not None:
        _spool(cache, folder, tree, None, has_both=asked.inputs and asked.outputs)
    return cache


def _folder(path: str | Path, keep: Keep, grads: bool) -> Path:
    if grads or not keep.detach:
        what = "include_grads=True" if grads else "detach=False"
        raise CacheError(
            f"path= writes values while the model runs, and {what} keeps what comes of them when "
            f"it has run: leave path= out, and write cache.save(path) after the backward pass."
        )
    folder = Path(path)
    check_free(folder)
    return folder


def _spool(
    cache: Cache, folder: Path, tree: Tree, names: object, *, has_both: bool = False
) -> None:
    recorder = None if cache._filling is None else cache._filling()
    assert recorder is not None
    folder.mkdir(parents=True, exist_ok=True)
    what = What(tree.name, recorder.asked(), tree.aliases, recorder.span, names)
    writer = PartWriter(folder, what, recorder.timeline, keeps=False)
    cache._parts = writer.parts
    recorder.spool = Spool(writer, has_both)
