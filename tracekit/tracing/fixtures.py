"""What stands on a model for a whole run: what records it, and edits of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, final

from torch import nn

from tracekit.capture import user_traceback
from tracekit.core.keep import Keep
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, SiteOrderError
from tracekit.interleave.duties import Span
from tracekit.interleave.hooks import Hooks
from tracekit.interleave.interleaver import Interleaver, Look
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.passage import Passage
from tracekit.interleave.protocol import Unwind
from tracekit.tracing.at import PositionEdit
from tracekit.tracing.cache import Cache
from tracekit.tracing.changes import Changes, Rounds
from tracekit.tracing.cut import StopAt
from tracekit.tracing.hooked import Firings, Hooked, author_of
from tracekit.tracing.recorder import Recorder
from tracekit.tracing.sites import Sites
from tracekit.tracing.timeline import Timeline
from tracekit.tracing.touches import Author, Touches


def _edited(edit: PositionEdit, mediator: Mediator, timeline: Timeline, value: Any) -> Any:
    """`value`, with the edit made; an error of it is one of the block that wrote the edit."""
    try:
        return edit.apply_now(timeline, value)
    except Exception as error:  # noqa: BLE001 - it is raised at the user's `with`
        error.__traceback__ = user_traceback(error)
        mediator.error = error
        raise Unwind from None


def _author(edit: PositionEdit) -> Author:
    line = edit.line if isinstance(edit.line, Line) else Line("", 0)
    return Author("positions", f"{edit.site}.at({edit.chosen!r})", line.file, line.number, 1)


def _never(_: str) -> bool:
    return False


@final
class Fixtures:
    """The recorders and the edits of tokens of one run; placed before the model gets there."""

    def __init__(
        self,
        tree: Tree,
        hooks: Hooks,
        passage: Passage,
        run: Interleaver,
        changes: Changes,
        kind: tuple[object, ...],
    ) -> None:
        self.changes = changes
        self._tree = tree
        self._hooks = hooks
        self._passage: Any = passage
        self._run: Any = run
        self._kind = kind
        self._recorders: list[Recorder] = []
        self._rounds: dict[Mediator, Rounds] = {}
        self._firings: Firings | None = None
        self._is_cut = False  # it ends in front of a layer, as was asked
        self.touches: Touches | None = None  # what edits do, if that is asked
        self.has_grad = False
        self.is_recomputed: Callable[[str], bool] = _never

    def __bool__(self) -> bool:
        return bool(self._recorders or self.changes.at_positions or self._firings)

    @property
    def is_recording(self) -> bool:
        """Whether there are recorders that were not let go of."""
        return bool(self._recorders)

    def record(
        self,
        mediator: Mediator | None,
        modules: dict[str, nn.Module],
        named: set[str],
        keep: Keep,
        what: tuple[bool, bool, bool],
    ) -> Cache:
        """Begin to record `what` of the modules (inputs, outputs, gradients).

        Of the rows of the mediator's block alone. CacheError if the model has passed one.
        """
        inputs, outputs, grads = what
        self._check(modules, inputs, grads)
        recorder = self._recorder(mediator, modules, named, keep)
        recorder.place(self._hooks, self._run, inputs, outputs, grads)
        return recorder.cache

    def record_sites(
        self, mediator: Mediator | None, sites: Sites, named: set[str], keep: Keep, grads: bool
    ) -> Cache:
        """Begin to record each value by itself; CacheError if the model has passed one."""
        for slot, modules in sites.modules.items():
            self._check(modules, slot is Slot.INPUT, grads)
        modules = {path: it for slot in sites.modules for path, it in sites.modules[slot].items()}
        recorder = self._recorder(mediator, modules, named, keep)
        recorder.place_at(self._hooks, self._run, sites, grads)
        return recorder.cache

    def _check(self, modules: dict[str, nn.Module], inputs: bool, grads: bool) -> None:
        has_grad = self._kind[1] and self._kind[0] is not False
        if grads and not has_grad:
            raise CacheError(
                "include_grads=True records nothing where the model computes without grad: leave "
                "torch.no_grad() out (generate() always computes so; trace() what it generated)."
            )
        passed = self._passed(modules, inputs)
        if passed is not None:
            raise CacheError(
                f"tracer.cache() was called when the model had passed {passed} (step "
                f"{self._run.step}); make the cache first in the block, or name modules that come "
                f"later."
            )

    def _recorder(
        self,
        mediator: Mediator | None,
        modules: dict[str, nn.Module],
        named: set[str],
        keep: Keep,
    ) -> Recorder:
        rows = mediator.rows if mediator is not None else None
        rows = None if rows is None or rows.is_all else rows
        cache, planner = Cache(), self._tree.planner
        keep = keep if planner is None else planner.record(cache, keep)
        made = Recorder(cache, self._tree, modules, named, keep, self._kind, self.changes, rows)
        self.changes.is_wanted = True
        self._recorders.append(made)
        return made

    def edit(self, mediator: Mediator, edit: PositionEdit, line: str) -> None:
        """Make an edit of tokens in all forwards to come; SiteOrderError if its module ran."""
        edit.line, edit.is_lasting = line, mediator.is_lasting
        if mediator.rounds is not None and self._has(mediator, mediator.rounds, edit):
            return  # a lasting edit runs anew in each step
        passed = self._passed([edit.site.path], edit.site.slot is Slot.INPUT)
        if passed is not None:
            raise SiteOrderError(
                f"{edit.site}.at(...) came when the model had passed {passed} (step "
                f"{self._run.step}), so tokens would be missed: write it first in the block, "
                f"outside of any loop over steps."
            )
        rows = mediator.rows
        edit.span = None if rows is None or rows.is_all else rows.span
        self.changes.at_positions.append(edit)
        self.changes.timeline.is_wanted = True
        change = partial(_edited, edit, mediator, self.changes.timeline)
        author = _author(edit)
        if self.touches is not None:
            self.touches.expect(author)
        self._hooks.edit(*edit.site, partial(self.kept, edit.site, author, change))
        if mediator.note is not None:
            mediator.note("edit", f"{edit.site}.at({edit.chosen!r})", None, line)

    # -- verified -------------------------------------------------------------------------------

    def kept(self, site: Site, author: Author, change: Callable[[Any], Any], value: Any) -> Any:
        """What `change` makes of a value, noted if that is asked."""
        if self.touches is None:
            return change(value)
        return self.touches.of_function(site, self.step, author, change, value)

    # -- functions at activations ---------------------------------------------------------------

    def hook(
        self, functions: Sequence[Hooked | StopAt], is_recomputed: Callable[[str], bool]
    ) -> None:
        """Let these functions be called in the run."""
        self.has_grad = bool(self._kind[1]) and self._kind[0] is not False
        self.is_recomputed = is_recomputed
        self._firings = Firings([one for one in functions if isinstance(one, Hooked)], self)
        for one in functions if self.touches is not None else ():
            if isinstance(one, Hooked) and one.direction == "fwd" and self.touches is not None:
                self.touches.expect(author_of(one))
        self._firings.place(self._hooks)
        for one in functions:
            if isinstance(one, StopAt):
                one.place(self._hooks)
                self._is_cut = True

    @property
    def step(self) -> int:
        """The step of the run."""
        return self._run.step

    def look(self, visit: Visit, value: object) -> Sequence[Look]:
        """Who wants to know what becomes of a value."""
        return self.changes.look(visit, value)

    def _has(self, mediator: Mediator, rounds: list[Any], edit: PositionEdit) -> bool:
        known = self._rounds.setdefault(mediator, Rounds())
        return known.has(edit, rounds[-1] if rounds else None)

    def copy_what_shares(self, value: object) -> None:
        """Give every record that shares memory with `value` its own copy, while it is right."""
        for recorder in self._recorders:
            recorder.copy_what_shares(value)

    @property
    def caches(self) -> list[tuple[Cache, Span | None]]:
        """What was recorded, and of which rows."""
        return [(each.cache, each.span) for each in self._recorders]

    def freeze(self, is_whole: bool) -> None:
        """Complete the caches, whatever the checks will say."""
        for recorder in self._recorders:
            recorder.freeze(is_whole and not self._is_cut)

    def check(self, is_whole: bool) -> None:
        """Raise if a record is not what was seen, or if something that was asked for never came."""
        for recorder in self._recorders:
            recorder.check(is_whole)
        for edit in self.changes.at_positions if is_whole else ():
            edit.check()
        if self._firings is not None and is_whole:
            self._firings.check(self._tree.is_gone)

    def let_go(self) -> None:
        """The model is done: what knows the run is not needed any more."""
        self._run = self._passage = None
        self._rounds.clear()
        self.is_recomputed = _never
        if self._firings is not None:
            self._firings.let_go()

    def clear(self) -> None:
        """Let go of the recorders."""
        self._recorders.clear()

    def _passed(self, paths: Iterable[str], inputs: bool) -> str | None:
        """The first of these modules that the model has passed in the run."""
        if self._run.has_ended:
            return next(iter(paths), None)
        if not self._run.has_begun:
            return None
        step = self._run.step
        passed: Callable[[str, int], bool] = (
            self._passage.has_begun if inputs else self._passage.has_ended
        )
        return next((path for path in paths if step > 0 or passed(path, step)), None)
