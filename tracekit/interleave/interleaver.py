"""All the mediators of one run, in order, beside one forward pass (or a generation's many)."""

# Guarantees:
#   - requests at one visit are served in the order of the mediators; a read sees the writes
#     before it;
#   - every request is answered: by a visit, by the run's end, or by an error that says why not.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, final

from tracekit.core.site import Site, Slot, Visit
from tracekit.errors import SiteOrderError, TracekitError, UnsupportedError
from tracekit.interleave import unserved
from tracekit.interleave.duties import Placement, Together, Unsettled
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.passage import Passage, Watch
from tracekit.interleave.protocol import (
    NextStep,
    Read,
    Reply,
    Skip,
    Sleep,
    State,
    StepOver,
    Unwind,
)

_RESULT_NOT_YET = object()

# Says why a visit has passed, given what the block got last.
Why: TypeAlias = "Callable[[Visit, tuple[Visit, str] | None], SiteOrderError]"


class Witness(Protocol):
    """Takes note of what blocks see."""

    def hand_out(self, visit: Visit, value: object, whole: object, is_own: bool) -> None:
        """A block may change `value`, a part of `whole`, or written by itself if `is_own`."""
        ...

    def take_back(self, visit: Visit, value: object, is_other: bool) -> object:
        """What the model goes on with from `visit`: `value`, which a block wrote if `is_other`."""
        ...

    def look(self, visit: Visit, value: object) -> Sequence[Look]:
        """Blocks are about to see `value`; who wants to know what becomes of it."""
        ...

    def edit_at_positions(self, mediator: Mediator, edit: object, line: str) -> None:
        """Make an edit of tokens, in all forwards to come."""
        ...


class Look(Protocol):
    """Wants to know what blocks made of a value."""

    is_skipped: bool  # it stands in for a module that did not run

    def note(self, value: object) -> None:
        """The model goes on with `value`."""
        ...


@final
class Interleaver:
    """Meets what the model reaches with what the workers ask for; knows no torch, no threads."""

    def __init__(
        self,
        passage: Passage,
        placement: Placement,
        witness: Witness,
        count_steps: Callable[[], int],
    ) -> None:
        self.step = 0
        self.mediators: list[Mediator] = []
        self.ranks: Together | None = None  # of a model that lies on several
        self._passage = passage
        self._placement = placement
        self._witness = witness
        self._count_steps = count_steps
        self._told: tuple[int, str] | None = None  # a block counts on so many steps, from this line
        self._serving: Visit | None = None  # where the model is paused
        self._sleepers: list[Mediator] = []
        self._has_stopped = False  # one of the blocks said stop
        self._result: object = _RESULT_NOT_YET
        self._steps_seen = -1  # the last step in which a watched module began
        self._entering = ""  # the module whose call begins the step, while blocks wake for that

    # -- the worker's side --------------------------------------------------------------------

    def expect(self, mediator: Mediator, visit: Visit, too_late: Why = unserved.too_late) -> None:
        """Watch for `visit`; SiteOrderError if it has passed."""
        if visit.site.slot is Slot.RESULT or visit == self._serving:
            return
        around = self._passage.runs_untapped(visit, self.step, self._serving, self._entering)
        if around is not None:
            raise unserved.tapped_too_late(visit, around, mediator.last)
        watch = self._passage.expect(visit.site.path, self.step)
        watch.is_asked = True
        self._check_not_skipped(mediator, visit)
        if visit.step == self.step and watch.has_passed(visit):
            skipped = self._passage.skipped_above(visit.site.path, self.step)
            if skipped is not None and not self._passage.was_called_again(skipped):
                raise unserved.was_skipped(visit, skipped)
            if visit.call and watch.missed_in == self.step:
                raise unserved.uncounted(visit)
            if watch.missed_in == self.step and not watch.started:
                raise unserved.too_late_if_at_all(
                    visit, self._passage.callers(visit.site.path), mediator.last
                )
            if mediator.slept_for is not None:
                raise unserved.too_late_after_sleep(visit, mediator.slept_for)
            raise too_late(visit, mediator.last)
        if self.has_ended:
            raise unserved.after_the_end(visit, mediator.last)
        if visit.step < self.step:
            raise unserved.step_is_over(visit, self.step, mediator.last)
        if visit.site.slot is Slot.INPUT:  # whoever sees the input may yet skip the module
            self._placement.make_skippable(visit.site.path)

    def _check_not_skipped(self, mediator: Mediator, visit: Visit) -> None:
        """What a block skipped for its own rows alone has run all the same, and was counted."""
        for skipped in mediator.skipped:
            above = skipped.site.path
            if skipped.step == visit.step and self._passage.is_in(visit.site.path, above):
                if self._passage.is_shared(visit.site.path):
                    raise unserved.uncounted_behind(visit, above)
                raise unserved.was_skipped(visit, above)

    def expect_skip(self, mediator: Mediator, visit: Visit) -> None:
        """Prepare to skip the module at `visit`; SiteOrderError if it has begun."""
        begin = Visit(Site(visit.site.path, Slot.INPUT), visit.step, visit.call)
        self.expect(mediator, begin, unserved.skipped_too_late)

    def open_source(self, mediator: Mediator, path: str) -> object:
        """The operations of what runs at `path`, sites from now on; SiteOrderError if it runs."""
        watch = self._passage.expect(path, self.step)
        is_beginning = self._serving is not None and self._serving.site == watch.input
        known = self._placement.opened(path)
        if known is not None and not is_beginning:
            return known
        if len(watch.running) > is_beginning or path == self._entering:
            raise unserved.opened_too_late(path, self.step, mediator.last)
        known = self._placement.open(path)
        self.watch_inside(path)
        return known

    def is_open(self, mediator: Mediator, visit: Visit) -> bool:
        """Whether the call of `visit` has begun, with its operations watched.

        SiteOrderError if the model is in it without that.
        """
        watch = self._passage.expect(visit.site.path, self.step)
        if self._placement.opened(visit.site.path) is not None:
            return watch.has_passed(visit)
        if visit.call in watch.running and visit != self._serving:
            raise unserved.opened_too_late(visit.site.path, self.step, mediator.last)
        return False

    def expect_step(self, step: int) -> bool | None:
        """True if `step` is the current one, None if it may come, False if the run has ended."""
        if self.has_ended:
            return False
        if step < self.step:
            raise unserved.step_has_gone(step, self.step)
        if step == self.step:
            return True
        self._passage.expect_any_call(self.step)
        return None

    @property
    def steps_begun(self) -> int:
        """How many steps are known to have begun."""
        return max(self._steps_seen + 1, self.step)

    def ran_in(self, path: str, step: int) -> bool | None:
        """Whether the module at `path` ran in `step`, the current or the last; None: not known."""
        return self._passage.ran_in(path, step)

    def count_steps(self, line: str) -> int:
        """How many steps the run will have, for the block at `line`; StepError if that is open."""
        self._told = self._count_steps(), line
        return self._told[0]

    @property
    def has_begun(self) -> bool:
        """Whether a block has seen the model run: before that, it has passed nothing."""
        return self._steps_seen >= 0

    @property
    def has_ended(self) -> bool:
        """Whether the traced call has returned."""
        return self._result is not _RESULT_NOT_YET

    # -- the model's side ---------------------------------------------------------------------

    def hand_out(self, visit: Visit, value: object, whole: object, is_own: bool) -> None:
        """A block may change `value`, a part of `whole`, or written by itself if `is_own`."""
        self._witness.hand_out(visit, value, whole, is_own)

    def take_back(self, visit: Visit, value: object, is_other: bool) -> object:
        """What the model goes on with from `visit`: `value`, which a block wrote if `is_other`."""
        return self._witness.take_back(visit, value, is_other)

    def edit_at_positions(self, mediator: Mediator, edit: object, line: str) -> None:
        """Make an edit of tokens, in all forwards to come."""
        self._witness.edit_at_positions(mediator, edit, line)

    def start(self) -> None:
        """Run every block to its first request."""
        if any(mediator.rounds is not None for mediator in self.mediators):
            self._passage.expect_any_call(self.step)  # each step begins such a block anew
        for mediator in self.mediators:
            if mediator.state is State.READY:  # else it stands in place, and has let the model run
                mediator.start()
            self._after_turn(mediator)

    def before(self, watch: Watch, inputs: object) -> object:
        """The module of `watch` is about to run with `inputs`; what it runs with."""
        if self._steps_seen != self.step:
            self._entering = watch.path
            self._begin_step()
            self._entering = ""
        watch.align(self.step)
        call = watch.begin()
        if not watch.is_asked:
            return inputs
        return self._serve(Visit(watch.input, self.step, call), inputs)

    def instead(self, watch: Watch) -> Skip | None:
        """The request to skip the call of `watch` that is about to run, if there is one."""
        visit = Visit(watch.output, self.step, watch.running[-1])
        for mediator in self.mediators:
            if (
                mediator.skips_for_all
                and isinstance(mediator.request, Skip)
                and mediator.awaits(visit)
            ):
                watch.skipped_in = self.step
                return mediator.request
        return None

    def after(self, watch: Watch, output: object) -> object:
        """The module of `watch` has returned `output`; what the model goes on with."""
        watch.align(self.step)
        call = watch.end()
        if call is None or not watch.is_asked:
            return output
        return self._serve(Visit(watch.output, self.step, call), output)

    def watch_inside(self, path: str) -> None:
        """What is directly in `path` changed: watch all of it."""
        self._passage.watch_inside(path, self.step)

    def end_step(self) -> None:
        """A decoding iteration has ended."""
        self.step += 1

    def finish(self, result: object) -> None:
        """The traced call has returned `result`: answer what is still asked."""
        had = max(self.step, 1)  # a forward pass ends no step
        if self._told is not None and self._told[0] != had:
            raise unserved.miscounted(*self._told, had)
        self._result = result
        self._answer_the_rest()
        if self.ranks is not None:
            self.ranks.end()

    def _answer_the_rest(self) -> None:
        while True:
            waiting = [each for each in self.mediators if each.state is State.WAITING]
            awake = [each for each in waiting if not isinstance(each.request, Sleep)]
            over = [each for each in waiting if each.sleeps_no_more()]
            for mediator in (over or awake or waiting)[:1]:
                mediator.answer(self._last_reply(mediator))
                if mediator.error is not None:
                    return
            if not waiting:
                return

    def close(self) -> None:
        """Unwind every block that still waits, and let go of everything."""
        if self.ranks is not None:
            self.ranks.leave(any(each.error or each.has_stopped for each in self.mediators))
            self.ranks = None
        for mediator in self.mediators:
            mediator.close()
        self.mediators.clear()
        self._sleepers.clear()
        self._result = None

    def _begin_step(self) -> None:
        self._steps_seen = self.step
        for mediator in self.mediators:
            if mediator.is_behind(self.step):
                mediator.answer(Reply(error=StepOver()))
                self._after_turn(mediator)
            elif mediator.awaits_step(self.step):
                mediator.answer(Reply(value=True))
                self._after_turn(mediator)

    def _serve(self, visit: Visit, value: object) -> object:
        if self.ranks is None:
            return self.serve_here(visit, value)
        asking = [mediator for mediator in self.mediators if mediator.awaits(visit)]
        return self.ranks.serve(self, visit, value, asking) if asking else value

    def refuse(self, mediators: Sequence[Mediator], error: TracekitError) -> None:
        """Raise `error` where these blocks wait, or where the model is if there are none."""
        for mediator in mediators:
            mediator.answer(Reply(error=error))
            self._after_turn(mediator)
        if not mediators:
            raise error

    def serve_here(self, visit: Visit, value: object) -> object:
        """Serve all who wait for `visit`, where the whole of the value is."""
        looks: list[Look] = []
        try:
            value = self._serve_all(visit, value, looks)
        finally:  # the block may stop the run here, with its edit made
            for look in looks:
                look.note(_settled(value))
        return value

    def _serve_all(self, visit: Visit, value: object, looks: list[Look]) -> object:
        is_served = True
        while is_served:  # who was woken meanwhile may ask for this visit, too
            is_served = False
            for mediator in self.mediators:
                if mediator.awaits(visit):
                    if mediator.rows is None:
                        value = _settled(value)
                    if not looks:
                        looks += self._witness.look(visit, value)
                    for look in looks:
                        look.is_skipped = look.is_skipped or isinstance(mediator.request, Skip)
                    is_served = True
                    self._serving = visit
                    value = mediator.offer(visit, value)
                    self._after_turn(mediator, visit, value)
                    self._serving = None
        return _settled(value)

    def note_sleep(self, mediator: Mediator) -> None:
        """`mediator` is about to sleep for what another block does."""
        self._sleepers.append(mediator)

    def _after_turn(
        self, mediator: Mediator, visit: Visit | None = None, value: object = None
    ) -> None:
        """Wake the blocks that slept for what `mediator` did, and leave if the run is over."""
        self._has_stopped = self._has_stopped or mediator.has_stopped
        while mediator.error is None:
            sleeper = next((each for each in self._sleepers if each.sleeps_no_more()), None)
            if sleeper is None:
                break
            self._sleepers.remove(sleeper)
            mediator = sleeper
            mediator.answer(Reply())
            self._has_stopped = self._has_stopped or mediator.has_stopped
        if mediator.error is not None:
            raise Unwind
        if self._has_stopped and not any(each.is_at_work for each in self.mediators):
            if visit is not None:  # the hooks of the observers will not be reached
                self._placement.show(visit, _settled(value))
            raise Unwind

    def _last_reply(self, mediator: Mediator) -> Reply:
        request = mediator.request
        if isinstance(request, NextStep):
            return Reply(value=False)
        if isinstance(request, Sleep):
            return Reply(error=None if request.is_over() else unserved.never_came(request.what_for))
        assert request is not None
        if isinstance(request, Read) and request.visit.site.slot is Slot.RESULT:
            return self._shown(mediator, request.visit)
        if mediator.has_finished_a_round:
            return Reply(error=StepOver())
        return Reply(error=unserved.at_the_end(request.visit, self._steps_seen + 1, self._passage))

    def _shown(self, mediator: Mediator, visit: Visit) -> Reply:
        try:
            whole = self._result if self.ranks is None else self.ranks.shown(visit, self._result)
        except UnsupportedError as error:
            return Reply(error=error)
        return mediator.shown(visit, whole)


def _settled(value: object) -> object:
    return value.settled() if isinstance(value, Unsettled) else value
