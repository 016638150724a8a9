"""Carry requests and replies between one worker and the model's thread."""

# Guarantees:
#   - exactly one of {model thread, worker} runs at any moment;
#   - what is known to be wrong is raised on the worker's side, at the line that asked;
#   - after close() the worker has left the block.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from tracekit.core.site import Site, Slot, Visit
from tracekit.errors import TracekitError
from tracekit.interleave import unserved
from tracekit.interleave.answers import Answers, Asked
from tracekit.interleave.duties import Channel, Keeper, Part, Rows, Run, Scope
from tracekit.interleave.protocol import (
    KINDS,
    TRANSITIONS,
    Move,
    NextStep,
    Read,
    Reply,
    Request,
    Skip,
    Sleep,
    State,
    Unwind,
    Write,
)


@final
class Mediator:
    """One intervention beside one run. Methods say from which side they are called."""

    def __init__(
        self,
        model: Any,
        run: Run,
        misfit: Callable[[object, object], str | None],
        line: Callable[[], str],
        rows: Rows | None = None,
        scope: Scope | None = None,
    ) -> None:
        self.model = model  # whose run it is; nothing here looks into it
        self._run = run
        self._misfit = misfit
        self._line = line
        self.rows = rows  # None: it sees the whole batch
        self.scope = scope
        self.channel: Channel | None = None
        self.state = State.READY
        self.request: Request | None = None
        self.step = 0  # the step that the block's next request is about
        self.error: BaseException | None = None  # what the block ended with
        self.has_stopped = False  # tracer.stop() was called
        self.has_skipped = False
        self.skipped: list[Visit] = []  # in this step, for its own rows alone
        self.is_lasting = False  # it is an edit: the run does not go on for it alone
        self.rounds: list[list[Site]] | None = None  # for a block that runs anew in each step:
        # what it asked for in each of its rounds so far
        self.has_finished_a_round = False
        self.last: tuple[Visit, str] | None = None  # served last, and the line that asked
        self.slept_for: str | None = None  # since then
        self.answers: Answers | None = None  # to what was asked ahead of the block
        self.note: Callable[..., None] | None = None  # takes (kind, visit, value, line, deferred)
        self.keeper: Keeper | None = None  # of what the block does to its values, if that is asked
        self.loans: list[Callable[[], BaseException | None]] = []  # asked when it has ended
        self._reply: Reply | None = None
        self._at: Visit | None = None  # where the model is paused for this worker
        self._value: object = None  # what it goes on with from there

    def __repr__(self) -> str:
        return f"<Mediator {self.state.name.lower()}, request={self.request}>"

    # -- the worker's side --------------------------------------------------------------------

    def begin(self) -> None:
        """The block runs from now on; said by itself where it stands in place."""
        self._move(Move.START)

    def leave(self, is_whole: bool) -> None:
        """A block that stands in place has ended; unless `is_whole`, nothing more is computed."""
        if self.state is State.DONE:
            return
        self.has_stopped = self.has_stopped or not is_whole
        if self.state is State.WAITING:  # an interrupt came between asking and handing over
            self._move(Move.ANSWER)
        self.end(None)

    def read(self, site: Site, call: int = 0) -> object:
        """The value at `site` in the current step; may block until the model gets there."""
        visit = Visit(site, self.step, call)
        if self.answers is not None:
            return self.recall(visit)
        if self.expect(visit):
            self._ask(Read(visit))
        elif self.keeper is not None:
            self.keeper.again(self._value, self._line())
        return self._value

    def write(self, site: Site, value: object, call: int = 0) -> None:
        """Let the model go on with `value` at `site`; may block until the model gets there."""
        visit = Visit(site, self.step, call)
        self._check_asked(visit)
        if self.expect(visit):
            self._ask(Write(visit, value))
            return
        self._check_fit(visit, value, self._value)
        if self.keeper is not None:
            self.keeper.wrote(self._value, value, self._line())
        self._value = value
        if self.note is not None:
            self.note("write", visit, value, self._line())

    def skip(self, site: Site, value: object, call: int = 0) -> None:
        """Do not run the module of `site`; blocks until the model gets there."""
        visit = Visit(site, self.step, call)
        self._check_asked(visit)
        if self._at != Visit(Site(site.path, Slot.INPUT), self.step, call):
            self._run.expect_skip(self, visit)
        self.has_skipped = True
        self._ask(Skip(visit, value))

    def edit_at_positions(self, edit: object) -> None:
        """Make an edit of tokens, in all forwards to come; SiteOrderError if its module ran."""
        self._run.edit_at_positions(self, edit, self._line())

    def open_source(self, site: Site, call: int | None = None) -> object:
        """The operations of what runs at `site` (an INPUT), sites from now on.

        What the `call` of an operation runs shows there: blocks until the model gets there.
        """
        if call is not None and not self._run.is_open(self, Visit(site, self.step, call)):
            self.read(site, call)
        return self._run.open_source(self, site.path)

    def wait_for_step(self, step: int) -> bool:
        """Block until `step` begins; False if the run ends before. Later requests are about it."""
        if self.answers is not None:
            begun = bool(self.recall(NextStep(step)))
            self.step = step if begun else self.step
            return begun
        begun = self.expect_step(step)
        return bool(self._ask(NextStep(step))) if begun is None else begun

    def go_to_step(self, step: int) -> None:
        """Block until `step` begins; StepError if the run ends before."""
        if not self.wait_for_step(step):
            raise unserved.step_never_came(step)

    def sleep(self, is_over: Callable[[], bool], what_for: str) -> None:
        """Block until another block has brought about what `is_over` tells."""
        if not is_over():
            self._run.note_sleep(self)
            self._ask(Sleep(is_over, what_for))
            self.slept_for = what_for

    @property
    def steps_begun(self) -> int:
        """How many steps the run is known to have begun."""
        return self._run.steps_begun

    def count_steps(self) -> int:
        """How many steps the run will have; StepError if that is not certain."""
        return self._run.count_steps(self._line())

    def ran_in(self, path: str, step: int) -> bool | None:
        """Whether the module at `path` ran in `step`, the current or the last; None: not known."""
        return self._run.ran_in(path, step)

    def stop(self) -> None:
        """Leave the block, and let the model compute nothing after this point."""
        if self.note is not None and not self.has_stopped:
            self.note("stop", "tracer.stop()", None, self._line())
        self.has_stopped = True
        raise Unwind(self)

    def _ask(self, request: Request) -> object:
        line = self._line()
        self.submit(request)
        assert self.channel is not None
        self.channel.suspend_worker()
        return self.collect(request, line)

    def submit(self, request: Request) -> None:
        """Leave a request for the model's side, just before the worker suspends."""
        self.request = request
        if self.rounds and isinstance(request, (Read, Write, Skip)):
            self.rounds[-1].append(request.visit.site)
        self._move(Move.ASK)

    def collect(self, request: Request, line: str) -> object:
        """Take the reply to `request`, just after the worker was resumed."""
        reply = self.take_reply()
        assert reply is not None
        if reply.error is not None:
            try:
                raise reply.error
            finally:
                del reply  # this frame is in the error's traceback, and must not refer to it
        self.arrive(request, reply.value, line)
        return reply.value

    def take_reply(self) -> Reply | None:
        """What came back for the last request, if anything did."""
        reply, self._reply = self._reply, None
        return reply

    def arrive(self, request: Request, value: object, line: str, deferred: bool = False) -> None:
        """The model is paused for `request`, which was made at `line`."""
        if isinstance(request, (Read, Write, Skip)):
            if self.note is not None:
                self.note(KINDS[type(request)], request.visit, value, line, deferred)
            if self.keeper is not None:
                self.keeper.came(KINDS[type(request)], value, line)
            self._at, self._value = request.visit, value
            self.last, self.slept_for = (request.visit, line), None
        elif isinstance(request, NextStep) and value:
            self.step = request.step
            if self.note is not None:
                self.note("step", f"step {request.step}", None, line, deferred)

    # -- ahead of the block (ahead.Ahead) -----------------------------------------------------

    def expect(self, visit: Visit) -> bool:
        """Prepare for `visit`; False if it is where the model is paused, with `value`."""
        if visit == self._at:
            return False
        self._run.expect(self, visit)
        return True

    def expect_step(self, step: int) -> bool | None:
        """True if `step` has begun, None if it may come, False if the run has ended."""
        begun = self._run.expect_step(step)
        self.step = step if begun else self.step
        return begun

    @property
    def value(self) -> object:
        """What the model goes on with from where it is paused."""
        return self._value

    def remember(self, answers: Answers) -> None:
        """Let the block begin, or go on, with `answers` to what it will ask."""
        self.step = answers.step
        self.answers = answers if answers or answers.is_all else None

    def recall(self, asked: Asked) -> object:
        """Worker's side: the answer to what was asked ahead."""
        assert self.answers is not None
        try:
            return self.answers.take(asked)
        finally:
            if not self.answers and not self.answers.is_all:
                self.answers = None

    def _check_asked(self, asked: Asked) -> None:
        """Nothing but reads is asked ahead: raises if something still is answered."""
        if self.answers is not None:
            self.recall(f"to change {asked}")

    def _check_fit(self, visit: Visit, new: object, old: object) -> None:
        found = self._misfit(new, old)
        if found is not None:
            raise unserved.misfit_error(visit, found)

    # -- the model's side ---------------------------------------------------------------------

    def start(self) -> None:
        """Run the block to its first request."""
        self.begin()
        self._resume()

    def awaits(self, visit: Visit) -> bool:
        """Whether the worker is parked for `visit`."""
        request = self.request
        return isinstance(request, (Read, Write, Skip)) and request.visit == visit

    def awaits_step(self, step: int) -> bool:
        """Whether the worker sleeps until `step`, or an earlier one, begins."""
        return isinstance(self.request, NextStep) and self.request.step <= step

    def is_behind(self, step: int) -> bool:
        """Whether the worker waits for a step before `step`, in a block that has another round."""
        request = self.request
        if self.rounds is None or not isinstance(request, (Read, Write, Skip)):
            return False
        return request.visit.step < step

    @property
    def skips_for_all(self) -> bool:
        """Whether a module that the block skips does not run at all."""
        return self.rows is None or self.is_lasting

    @property
    def is_at_work(self) -> bool:
        """Whether the run goes on for this block: it has not ended, and is no lasting edit."""
        return self.state is not State.DONE and not self.is_lasting

    def shown(self, visit: Visit, value: object) -> Reply:
        """The worker's part of a value that the model does not go on with."""
        try:
            return Reply(value if self.rows is None else self.rows.narrow(visit, value).value)
        except TracekitError as error:
            return Reply(error=error)

    def sleeps_no_more(self) -> bool:
        """Whether what the worker sleeps for has come."""
        return isinstance(self.request, Sleep) and self.request.is_over()

    def offer(self, visit: Visit, value: object) -> object:
        """Give `value` to the worker that awaits it; what the model goes on with."""
        while self.awaits(visit) and self.error is None:
            try:
                part = None if self.rows is None else self.rows.narrow(visit, value)
            except TracekitError as error:
                self.answer(Reply(error=error))
                continue
            given = shown = value if part is None else part.value
            request = self.request
            # Where blocks have rows of their own, a skipped module runs, for the others' rows.
            is_skipped = isinstance(request, Skip) and not self.skips_for_all
            is_written = isinstance(request, Write) or is_skipped
            if isinstance(request, (Write, Skip)) and is_written:
                found = self._misfit(request.value, given)
                if found is not None:
                    self.answer(Reply(error=unserved.misfit_error(visit, found)))
                    continue  # the block may catch it, and write another value
                shown = request.value
            if is_skipped:
                earlier = (each for each in self.skipped if each.step == visit.step)
                self.skipped = [*earlier, visit]
            is_own = isinstance(request, (Write, Skip))
            whole = value if part is None else part.whole
            self._run.hand_out(visit, shown, whole, is_own)
            if self.keeper is not None:
                self.keeper.begin(visit, given)
            self.answer(Reply(shown))
            new, self._value, self._at = self._value, None, None
            if self.keeper is not None:
                self.keeper.end(new)
            new = self._run.take_back(visit, new, is_other=new is not given or is_own)
            value = new if part is None else self._put_back(part, new)
        return value

    def _put_back(self, part: Part, new: object) -> object:
        """What the model goes on with; if `new` can't be put back, the block ends with the error.

        The block has gone on from the line that did it, so the error says where it had the value.
        """
        try:
            return part.put_back(new)
        except TracekitError as error:
            at = f" The block asked for it at {self.last[1]}." if self.last is not None else ""
            self.error = type(error)(f"{error.args[0]}{at}")
            return part.value

    def answer(self, reply: Reply) -> None:
        """Wake the worker with `reply`, and wait until it asks again or ends."""
        self.request = None
        self._reply = reply
        self._move(Move.ANSWER)
        self._resume()

    def close(self) -> None:
        """Unwind the block, wherever it waits."""
        while self.state is State.WAITING or self.state is State.RUNNING:
            if self.state is State.RUNNING:  # an interrupt came just before it was resumed
                self._reply = Reply(error=Unwind(self))
                self._resume()
            else:
                self.answer(Reply(error=Unwind(self)))

    def end(self, error: BaseException | None) -> None:
        """Worker's side, as its last act: the block has ended."""
        if error is not None and not isinstance(error, Unwind):
            self.error = error
        found = [loan() for loan in self.loans]  # if it edited what the model does not read
        self.loans.clear()
        self.error = self.error or next((each for each in found if each is not None), None)
        self.request = None
        self._move(Move.END)

    def _resume(self) -> None:
        assert self.channel is not None
        if self.scope is None:
            self.channel.resume_worker()
            return
        self.scope.enter()
        try:
            self.channel.resume_worker()
        finally:
            self.scope.leave()

    def _move(self, move: Move) -> None:
        self.state = TRANSITIONS[self.state, move]
