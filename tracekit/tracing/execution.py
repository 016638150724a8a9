"""One run of a model: its hooks, its interventions, its recorders, from start to clean end."""

# Guarantees, on every way out (the end, stop(), an error in the block or in the model, Ctrl-C):
#   - no hook is on the model, and no worker is parked;
#   - nothing here refers to itself, so values live exactly as long as the user's names.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from tracekit.capture import caller_frame, user_traceback
from tracekit.core.keep import Keep
from tracekit.core.nest import map_leaves, misfit
from tracekit.core.origins import note_visit
from tracekit.core.quirks import is_checkpointing
from tracekit.core.site import Line, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import Versions
from tracekit.errors import CacheError, TracekitError, UnsupportedError
from tracekit.interleave.ahead import Ahead
from tracekit.interleave.duties import Channel
from tracekit.interleave.hooks import Hooks
from tracekit.interleave.interleaver import Interleaver, Look
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.passage import Passage
from tracekit.interleave.places import Places
from tracekit.interleave.protocol import Unwind
from tracekit.interleave.worker import current_mediator, later_beside, run_beside, run_here
from tracekit.tracing.at import PositionEdit
from tracekit.tracing.cache import Cache
from tracekit.tracing.call import OVER, TracedCall
from tracekit.tracing.changes import Changes
from tracekit.tracing.fixtures import Fixtures
from tracekit.tracing.glance import Glance
from tracekit.tracing.graph import Log
from tracekit.tracing.intervention import Intervention
from tracekit.tracing.overwritten import check_versions
from tracekit.tracing.rows import AllRows, Copies
from tracekit.tracing.select import Selector, select
from tracekit.tracing.sharded import joined
from tracekit.tracing.sites import Sites
from tracekit.tracing.timeline import Timeline
from tracekit.tracing.verified.run import Verifier


@final
class Execution:
    """A run of `call` on the model of `tree`; used once.

    `edits` are served before all else at each visit; `thread` is the one that the model will run
    on, the caller's by default.
    """

    def __init__(
        self,
        tree: Tree,
        call: TracedCall,
        grad: bool | None,
        edits: Sequence[Intervention] = (),
        thread: int | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        self._tree, self._call, self._grad = tree, call, grad
        self._verifier = verifier  # says what the edits did, if that is asked
        self._edits = [edit for edit in edits if not edit.functions]
        self._functions = [each for edit in edits for each in edit.functions]
        self._has_grad = torch.is_grad_enabled() and grad is not False
        modes = (grad, torch.is_grad_enabled(), tree.root.training)
        self._kind = (*modes, bool(edits))  # models differ by it
        self._hooks = Hooks(tree.module, thread)
        self._places = Places(tree, self._hooks)
        self._passage = Passage(self._places, self._places.watch_ends, self._places.watch_begins)
        self._versions = Versions()
        self.log = Log()
        self.timeline = Timeline()
        self.mediators: list[Mediator] = []
        self._deferred: list[tuple[Mediator, Callable[[], None]]] = []
        self._interleaver = Interleaver(self._passage, self._places, self, call.count_steps)
        self._fixtures = Fixtures(
            tree, self._hooks, self._passage, self._interleaver, Changes(self.timeline), self._kind
        )
        self._fixtures.touches = None if verifier is None else verifier.touches
        self._ticker: Interleaver | Glance = self._interleaver
        self._hooks.subscriber = self._interleaver
        self._call = joined(tree, self._interleaver, self._hooks, call, verifier is not None)

    def run(self, interventions: Sequence[Intervention]) -> BaseException | None:
        """Run the model, and the interventions beside it; the error that ended it, if one did.

        The error of a block comes before one that the model ran into because of it.
        """
        with self._tree.around_runs():
            try:
                return self._run_all(interventions)
            finally:
                if self._fixtures.is_recording:  # Ctrl-C came when the run was over
                    self._checked(is_whole=False)

    def _run_all(self, interventions: Sequence[Intervention]) -> BaseException | None:
        glance = self._glance_of(interventions)
        if glance is not None and glance.is_proven:
            error = self._run_at_a_glance(glance, interventions)
        else:
            error = self._run_with_requests(interventions)
            if glance is not None and error is None:
                glance.prove(self.mediators)
        try:
            checked = self._checked(is_whole=error is None)
            error = checked if error is None else error
            if self._verifier is not None:
                self._verifier.conclude(error)
            return error
        finally:  # an error refers to frames that refer to this one: it must not refer back
            self.mediators.clear()
            del error

    def _glance_of(self, interventions: Sequence[Intervention]) -> Glance | None:
        """What the blocks will ask, if that is all known and nothing else has a part in the run."""
        others = (self._edits, self._functions, self._fixtures, self._verifier)
        if not interventions or any(others) or self._interleaver.ranks is not None:
            return None
        blocks = [(each.asked, each.rows) for each in interventions if each.asked is not None]
        if len(blocks) < len(interventions):
            return None
        self._tree.refresh_if_changed()
        return Glance(self._tree, self._kind, blocks, self._versions)

    def _run_at_a_glance(
        self, glance: Glance, interventions: Sequence[Intervention]
    ) -> BaseException | None:
        mediators = [self._new_mediator(*each) for each in enumerate(interventions)]
        results: list[Any] = []
        error = None
        self._interleaver.mediators.clear()  # nobody asks for anything
        try:
            glance.place(self._hooks, mediators)
            error = self._run(glance, results)
            glance.answer(results, self._has_grad)
            for mediator, intervention in zip(mediators, interventions, strict=True):
                self._run_behind(mediator, intervention.body)
            return self._first_error(error)
        finally:
            glance.close()
            del error, results

    def _run_with_requests(self, interventions: Sequence[Intervention]) -> BaseException | None:
        if self._functions:
            self._fixtures.hook(self._functions, self._is_recomputed)
        if interventions or self._edits:
            if self._edits or any(each.has_rounds for each in interventions):
                self.timeline.is_wanted = True  # it may choose positions when step 0 has begun
            self._tree.refresh_if_changed()
            has_blocks = len(self._edits) + len(interventions) + len(self.mediators) > 1
            for place, intervention in enumerate((*self._edits, *interventions)):
                mediator = self._new_mediator(place, intervention)
                mediator.is_lasting = place < len(self._edits)
                if mediator.is_lasting and has_blocks:  # which may edit in place what it keeps
                    mediator.rows = AllRows(Copies())
                self._begin(mediator, intervention)
        error = self._run()
        self._run_deferred()
        try:
            return self._first_error(error)
        finally:
            del error

    def _first_error(self, error: BaseException | None) -> BaseException | None:
        """That of the first block that has one, else `error`."""
        try:
            for mediator in self.mediators:
                if mediator.error is not None:
                    error, mediator.error = mediator.error, None
                    break
            return error
        finally:
            del error

    def open_in_place(self, channel: Channel) -> Mediator:
        """The mediator of a block that runs from now on, on the caller's thread."""
        self._tree.refresh_if_changed()
        mediator = self._new_mediator(0)
        mediator.channel = channel
        mediator.begin()
        return mediator

    @property
    def mode(self) -> AbstractContextManager[object]:
        """What a block is to run under, besides the torch state of the user's thread."""
        return self._tree.around_runs()

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, with every hook off."""
        return self._call is OVER

    def abandon(self) -> None:
        """Take the hooks off, if the block failed before the model ran."""
        if self.is_over:
            return
        self._close()
        self._checked(is_whole=False)

    def _run(
        self, steps: Interleaver | Glance | None = None, results: list[Any] | None = None
    ) -> BaseException | None:
        try:
            if self._verifier is not None:
                self._verifier.begin(self._call)
            self._interleaver.start()
            self._ticker = steps or self._interleaver
            result = self._call.make(self)
            if results is not None:
                results.append(result)
            if self._verifier is not None:
                self._verifier.note(result)
            self._interleaver.finish(result)
        except Unwind:
            pass
        except BaseException as caught:  # noqa: BLE001 - it is raised again at the user's `with`
            caught.__traceback__ = user_traceback(caught)
            return caught
        finally:
            self._close()
        return None

    def record(
        self,
        modules: Selector | None,
        keep: Keep,
        inputs: bool,
        outputs: bool,
        grads: bool,
        invoke: int | None = 0,
    ) -> Cache:
        """Begin to record, before the model passes the modules; CacheError if it has.

        `invoke` is what the graph says of a cache that is made in no block of the run.
        """
        own = self._own_mediator()
        found, named = select(self._tree, modules)
        cache = self._fixtures.record(own, found, named, keep, (inputs, outputs, grads))
        self._note_cache(own, invoke, f"{len(found)} module{'s' * (len(found) != 1)}")
        return cache

    def record_sites(
        self, sites: Sites, named: set[str], keep: Keep, grads: bool, invoke: int | None = 0
    ) -> Cache:
        """Begin to record values each by itself; CacheError if the model has passed one."""
        own = self._own_mediator()
        cache = self._fixtures.record_sites(own, sites, named, keep, grads)
        self._note_cache(own, invoke, f"{len(sites.asked)} values")
        return cache

    def _own_mediator(self) -> Mediator | None:
        """That of the block which asks for a cache; None outside of blocks."""
        if self.is_over:
            raise CacheError("tracer.cache() belongs into the block of the trace.")
        own = current_mediator()
        return own if own in self.mediators else None

    def _note_cache(self, own: Mediator | None, invoke: int | None, what: str) -> None:
        note = None if own is None else own.note
        note = note or partial(self.log.note, invoke)
        note("cache", what, None, _line())

    def _begin(self, mediator: Mediator, intervention: Intervention) -> None:
        body = intervention.body
        ask = intervention.forecast if self._verifier is None else None
        forecast = ask() if ask is not None else None
        if forecast is None:
            run_beside(mediator, body, self._grad)
            return
        go_live = later_beside(mediator, body, self._grad)
        mediator.channel = Ahead(mediator, forecast, go_live, True, intervention.file)
        self._deferred.append((mediator, body))

    def _run_deferred(self) -> None:
        """Run the blocks that have all their answers by now."""
        deferred = [(each.answers, each, body) for each, body in self._deferred]
        deferred = [one for one in deferred if one[0] is not None and one[0].is_all]
        for answers, _, _ in deferred:  # of all before any block runs: it may store something
            assert answers is not None
            answers.look_again()
        for _, mediator, body in deferred:
            self._run_behind(mediator, body)
        self._deferred.clear()

    def _run_behind(self, mediator: Mediator, body: Callable[[], None]) -> None:
        if mediator.scope is not None:
            mediator.scope.enter()
        run_here(mediator, body, self._grad)
        if mediator.scope is not None:
            mediator.scope.leave()

    def _new_mediator(self, place: int, intervention: Intervention | None = None) -> Mediator:
        """A mediator at this place in the order; a block that stands in place gives way."""
        rows = intervention.rows if intervention is not None else None
        scope = intervention.scope if intervention is not None else None
        mediator = Mediator(self._tree, self._interleaver, misfit, _line, rows, scope)
        mediator.rounds = [] if intervention is not None and intervention.has_rounds else None
        invoke = place - len(self._edits) if place >= len(self._edits) else None
        self.log.of(mediator, invoke)
        if self._verifier is not None:
            self._verifier.touches.follow(mediator, invoke, getattr(intervention, "author", None))
        self.mediators.insert(place, mediator)
        self._interleaver.mediators.insert(place, mediator)
        return mediator

    def end_step(self) -> None:
        """A decoding iteration has ended."""
        self._ticker.end_step()

    def _close(self) -> None:
        self._call, self._edits, self._functions = OVER, [], []
        if self._verifier is not None:
            self._verifier.end()
        self.timeline.close()
        was_interrupted = False
        for clean in (self._interleaver.close, self._hooks.remove):
            is_clean = False
            while not is_clean:
                try:
                    clean()
                    is_clean = True
                except KeyboardInterrupt:  # first things first
                    was_interrupted = True
        self._fixtures.let_go()
        del self._interleaver, self._passage, self._ticker
        if was_interrupted:
            raise KeyboardInterrupt

    def _checked(self, is_whole: bool) -> BaseException | None:
        """Complete the caches, whatever the checks say: nothing is lost to an error."""
        if any(mediator.has_stopped or mediator.has_skipped for mediator in self.mediators):
            is_whole = False
        self._fixtures.freeze(is_whole)
        try:
            check_versions(self._versions, self._has_grad)
            self._fixtures.check(is_whole)
        except TracekitError as error:
            return error
        finally:
            if self._verifier is not None:
                self._verifier.see_caches(self._fixtures.caches)
            self._fixtures.clear()
        return None

    def edit_at_positions(self, mediator: Mediator, edit: object, line: str) -> None:
        """Make an edit of tokens, in all forwards to come; SiteOrderError if its module ran."""
        assert isinstance(edit, PositionEdit)
        self._fixtures.edit(mediator, edit, line)

    def look(self, visit: Visit, value: object) -> Sequence[Look]:
        """Who wants to know what blocks make of a value that they are about to see."""
        return self._fixtures.changes.look(visit, value)

    def hand_out(self, visit: Visit, value: object, whole: object, is_own: bool) -> None:
        """A block may change `value`, a part of `whole`, or written by itself if `is_own`."""
        self._fixtures.copy_what_shares((value, whole))
        if not is_own:
            self._versions.note(visit, value)
        note_visit(visit, value, self._has_grad)

    def take_back(self, visit: Visit, value: object, is_other: bool) -> object:
        """What the model goes on with from `visit`: `value`, which a block wrote if `is_other`.

        It is a copy then: the model may write into it, and the block may write it elsewhere too.
        """
        is_edited = self._versions.renew(visit)
        if is_edited:
            self.log.edited(visit)
        is_changed = is_edited or is_other
        if is_changed and self._has_grad and self._is_recomputed(visit.site.path):
            raise UnsupportedError(
                f"{visit} was edited inside a layer under gradient checkpointing: backward would "
                f"compute the layer again without the edit, and give other gradients. Switch "
                f"checkpointing off, or edit the layer's own output."
            )
        return self.apart(value) if is_other else value

    def apart(self, value: object) -> object:
        """`value`, in memory of its own."""
        return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)

    def _is_recomputed(self, path: str) -> bool:
        above = filter(self._places.is_module, self._places.ancestors(path))
        return any(is_checkpointing(self._tree.module(ancestor)) for ancestor in above)


def _line() -> str:
    frame = caller_frame()
    return Line(frame.f_code.co_filename, frame.f_lineno)
