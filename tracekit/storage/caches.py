"""Caches of traces from their folders: `load_cache`."""

from __future__ import annotations

from pathlib import Path

from tracekit.capture import showing_own_lines
from tracekit.core.fingerprint import fingerprint
from tracekit.core.tree import Tree
from tracekit.errors import StorageError
from tracekit.models.model import Model
from tracekit.models.rerun import Rerun
from tracekit.tracing.cache import Cache
from tracekit.tracing.cache_reading import FromFile, Read, read_cache
from tracekit.tracing.named_cache import NamedCache


@showing_own_lines
def load_cache(
    path: str | Path, *, model: Model | None = None, partial: bool = False
) -> Cache | NamedCache:
    """The cache that `cache.save(path)` or `tracer.cache(path=path)` wrote.

    A value is read when it is asked for, and every time, unless somebody has it still; it is on the
    CPU. No code comes from the file: an object of a class that is neither of torch nor of
    transformers nor of the standard library comes back as a mapping. `model`, with the weights
    that the cache is of, lets `cache.verify()` and `include_last=True` run it again. `partial`
    takes one of a run that was killed, too, as far as it came.

    StorageError, which names the file, for what is damaged, incomplete, or of another model.
    """
    found = read_cache(Path(path), partial=partial)
    if model is not None:
        _check_belongs(found, model, path)
        _give_model(found, model)
    return found.cache


def _check_belongs(found: Read, model: Model, path: str | Path) -> None:
    kind = type(model.module).__name__
    if found.model is not None and found.model != kind:
        raise StorageError(
            f"{str(path)!r} is a cache of a {found.model}, and this model is a {kind}."
        )
    if found.weights is not None and found.weights != fingerprint(model.module):
        raise StorageError(
            f"{str(path)!r} is a cache of a {kind} with other weights, or in another dtype: give "
            f"the model as it was then."
        )


def _give_model(found: Read, model: Model) -> None:
    changes = found.store._changes  # pyright: ignore[reportPrivateUsage] - it is being made
    rerun = changes.timeline.rerun
    if isinstance(rerun, FromFile) and rerun.why is None:
        tree: Tree = model._tree  # pyright: ignore[reportPrivateUsage] - as the models' own files do
        again = Rerun.again(tree, rerun.told(), found.root)
        changes.timeline.rerun = changes.whole.timeline.rerun = again
