"""A run that is verified: the same model without edits first, then with them, and compared."""

# Guarantees:
#   - the run with edits has the random numbers, the inputs and the buffers that it has alone;
#   - the runs before it are on a thread of their own, where no hook of this run does anything;
#   - when the report is made, nothing of the values is kept.

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from tracekit.core.nest import map_leaves, tensors
from tracekit.core.site import Site
from tracekit.core.tree import Tree
from tracekit.core.versions import changes
from tracekit.errors import CacheError, InputError, UnsupportedError, did_you_mean
from tracekit.interleave.duties import Span
from tracekit.interleave.worker import ModelThread
from tracekit.tracing.cache import Cache
from tracekit.tracing.call import TracedCall
from tracekit.tracing.select import Selector, select
from tracekit.tracing.sightings import Clean, watched
from tracekit.tracing.touches import Touches
from tracekit.tracing.verified.cached import see_cache
from tracekit.tracing.verified.comparison import Comparison
from tracekit.tracing.verified.expecting import Meant, with_expectation
from tracekit.tracing.verified.grid import Grid, Tell
from tracekit.tracing.verified.judging import Found, judged
from tracekit.tracing.verified.predictions import logits_of, numbers_of
from tracekit.tracing.verified.report import EditReport

BUDGET: Final = 4 * 2**30  # bytes for the values of the clean run; behind that, digests


@final
@dataclass(frozen=True)
class Wanted:
    """How a run is verified.

    `rows`, `positions` and `modules`: what the edits are meant to touch; `watch`: which modules are
    compared (None: all); `budget`: how many bytes of values of the clean run are kept.
    """

    meant: Meant = field(default_factory=Meant)
    watch: Selector | None = None
    budget: float = BUDGET
    check_precision: bool | None = None

    @classmethod
    def of(cls, given: object) -> Wanted | None:
        """What `verify=` says: True, or a dictionary of the above; None for False."""
        if isinstance(given, bool) or given is None:
            return cls() if given else None
        if not isinstance(given, Mapping):
            raise InputError(
                f"verify= is True, or a dictionary such as dict(rows=[0], positions=[5]), not "
                f"{given!r:.60}."
            )
        told = dict(cast("Mapping[str, Any]", given))
        meant = Meant.of(*(told.pop(name, None) for name in ("rows", "positions", "modules")))
        for name in told:
            if name not in _OPTIONS:
                known = ("rows", "positions", "modules", *_OPTIONS)
                raise InputError(f"verify= knows no {name!r}{did_you_mean(name, known)}")
        return cls(meant, **told)


_OPTIONS = ("watch", "budget", "check_precision")


@final
class Verifier:
    """One run that is verified; used once. `tell` gives the text of tokens."""

    def __init__(self, tree: Tree, wanted: Wanted, tell: Tell | None = None) -> None:
        self._tree = tree
        self._wanted = wanted
        self._tell = tell
        self._on_exit = ExitStack()
        self._counts: Counter[Site] = Counter()
        self.touches = Touches(self._counts)
        self._comparison: Comparison | None = None
        self._clean: Tensor | None = None
        self._bare: Tensor | None = None
        self._result: Tensor | None = None
        self._has_logits = False
        self._forwards = 0
        self._notes: list[str] = []
        self.report: EditReport | None = None

    # -- before ---------------------------------------------------------------------------------

    def begin(self, call: TracedCall) -> None:
        """Run the model without edits, and let the run that follows be watched."""
        self._tree.refresh_if_changed()
        paths = None
        if self._wanted.watch is not None:
            paths = set(select(self._tree, self._wanted.watch)[0])
        clean = Clean(self._wanted.budget, lambda path: paths is None or path in paths)
        grids: list[Grid] = []
        with _same_state(self._tree):
            _elsewhere(partial(self._run_clean, call, clean, grids))
        clean.close()
        grid = grids[0] if grids else Grid(1, ())
        self._comparison = Comparison(clean, grid, self.touches)
        see, touches = self._comparison.see, self.touches
        self._on_exit.enter_context(
            watched(self._tree, see, self._counts, lambda: touches.is_inside)
        )

    def _run_clean(self, call: TracedCall, clean: Clean, grids: list[Grid]) -> None:
        tree, seen = self._tree, watched(self._tree, clean.see, clean.counts)
        with _same_state(tree), _inputs_apart(tree, grids) as is_plain, seen:
            result = call.make(None)
        self._forwards += 1
        self._clean, self._has_logits = numbers_of(result), logits_of(result) is not None
        del result
        if is_plain():
            self._bare = numbers_of(call.make(None))
            self._forwards += 1

    # -- behind ---------------------------------------------------------------------------------

    def end(self) -> None:
        """The model has run: take the hooks off."""
        self._on_exit.close()

    def see_caches(self, caches: Sequence[tuple[Cache, Span | None]]) -> None:
        """Hold what the caches of the run have against what was written."""
        for cache, span in caches:
            see_cache(self.touches, cache, span)

    def note(self, result: Any) -> None:
        """The model has returned."""
        self._result = numbers_of(result)

    def conclude(self, error: BaseException | None) -> None:
        """Make the report; nothing else is kept."""
        comparison, self._comparison = self._comparison, None
        if comparison is None:
            return
        now = self._result
        if now is None and error is None:
            self._notes.append("the run was stopped before the model had returned anything.")
        found = Found(
            self._tree,
            self.touches,
            comparison,
            self._tell,
            self._clean,
            self._bare,
            now,
            self._has_logits,
            error,
            self._forwards + 1,
            self._notes,
        )
        report = judged(found)
        self.report = with_expectation(report, self._wanted.meant) if self._wanted.meant else report
        self.touches = Touches(self._counts)
        self._clean = self._bare = self._result = None


def report_of(verifier: Verifier | None) -> EditReport:
    """Its report; CacheError where there is none."""
    if verifier is None or verifier.report is None:
        raise CacheError(
            "tracer.report is of a trace that was opened with verify=True, and that has run."
        )
    return verifier.report


def _elsewhere(run: Callable[[], None]) -> None:
    """Run something on a pooled thread, under the caller's torch state; raises its error."""
    thread = ModelThread()
    thread.prepare(run)
    thread.suspend_worker()
    error, thread.error = thread.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error  # its frames refer to this one


@contextmanager
def _same_state(tree: Tree) -> Generator[None]:
    """Put random numbers, and the buffers of a model in training, back to what they were."""
    numbers = torch.get_rng_state()
    is_on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    on_cuda = torch.cuda.get_rng_state_all() if is_on_cuda else []
    is_training = any(module.training for module in tree.root.modules())
    buffers = list(tree.root.buffers()) if is_training else []
    were = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        torch.set_rng_state(numbers)
        if is_on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)
        with torch.no_grad():
            for buffer, was in zip(buffers, were, strict=True):
                buffer.copy_(was)


@contextmanager
def _inputs_apart(tree: Tree, grids: list[Grid]) -> Generator[Callable[[], bool]]:
    """Give the model copies of its inputs, so that what it writes into them is lost with them.

    What is yielded tells whether it wrote into none, so that it may run on the inputs themselves.
    """
    copies: list[tuple[Tensor, int]] = []
    others: list[object] = []

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        grids.append(Grid.of(module, (args, kwargs)))
        own = map_leaves(partial(_copied, others), (args, kwargs))
        copies.extend((tensor, changes(tensor)) for tensor in tensors(own))
        return own

    handle = tree.root.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    try:
        yield lambda: not others and all(changes(it) == version for it, version in copies)
    finally:
        handle.remove()


def _copied(others: list[object], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
        return leaf
    others.append(leaf)
    try:
        return copy.deepcopy(leaf)
    except Exception as error:
        raise UnsupportedError(
            f"verify= runs the model more than once, and a {type(leaf).__name__} among its inputs "
            f"can't be copied: run it without, or without gradients."
        ) from error
