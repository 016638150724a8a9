"""Ask in the place of a worker, as long as it is known ahead what its block will ask."""

# Guarantees:
#   - what is asked ahead is asked as the block would: one request after the other, each at the
#     moment when the block could have asked it;
#   - nothing waits on another thread for an answer that came in time: the block takes it later;
#   - from the first thing that is not known ahead, or that fails, the block runs by itself.

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeAlias, final

from tracekit.core.site import Line, Site, Visit
from tracekit.interleave.answers import Answers, Asked, Made
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import NextStep, Read, Reply, Request, Unwind


class Stop(NamedTuple):
    """The block leaves the run here."""


class Wanted(NamedTuple):
    """A value of the step at hand."""

    site: Site
    call: int = 0
    part: Callable[[Any], Any] | None = None  # all that the block uses of it; by default, the whole


Asking: TypeAlias = Wanted | NextStep | Made | Stop
# Yields what it asks for, with the line of the block, and is sent what came back.
Forecast: TypeAlias = Generator[tuple[Any, int], Any, Any]


class Foretold(NamedTuple):
    """A forecast, and whether the block will see all that it saw: to be asked once, behind it."""

    steps: Forecast
    is_as_it_was: Callable[[], bool]


@final
class Ahead:
    """A Channel that has no thread: resuming it asks for the next thing of a forecast.

    Where the forecast is unsure, or what it asked for has failed, `go_live` lets the block itself
    run, which finds the answers in its mediator. With `is_all` the forecast is about the whole
    block; if that ends as foreseen, or with an error, the block is left to run behind the model.
    """

    def __init__(
        self,
        mediator: Mediator,
        forecast: Foretold,
        go_live: Callable[[], None],
        is_all: bool,
        file: str,
    ) -> None:
        self._mediator = mediator
        self._forecast: Foretold | None = forecast
        self._go_live: Callable[[], None] | None = go_live
        self._is_all = is_all
        self._file = file
        self._answers = Answers(mediator.step, is_all)
        # What the model's side is to answer, the line, and what the block uses of the answer.
        self._asked: tuple[Request, str, Callable[[Any], Any] | None] | None = None
        self._error: BaseException | None = None  # what was answered last

    def resume_worker(self) -> None:
        """Model's side: take the answer, and go on to the next request."""
        if self._forecast is None or not self._ask_on(self._accepted()):
            self._finish()

    def suspend_worker(self) -> None:
        raise AssertionError("nobody waits here")

    def begin(self) -> bool:
        """Worker's side: whether there is something that has to be waited for."""
        if self._ask_on(None):
            return True
        self._give_answers()
        return False

    def _accepted(self) -> object:
        """What the reply to the last request says."""
        reply = self._mediator.take_reply()
        asked, self._asked = self._asked, None
        if reply is None:
            return None
        if asked is None:  # unwound by an interrupt that came in between
            self._note("", reply)
            return None
        request, line, part = asked
        assert isinstance(request, (Read, NextStep))
        self._note(request.visit if isinstance(request, Read) else request, _only(part, reply))
        if reply.error is None:
            self._mediator.arrive(request, reply.value, line, deferred=True)
        return reply.value

    def _ask_on(self, value: object) -> bool:
        """Ask for what comes next, until something has to be waited for; False at the end."""
        while self._error is None and self._forecast is not None:
            try:
                asked, line = self._forecast.steps.send(value)
            except StopIteration:
                return False
            except Exception:  # noqa: BLE001 - Unsure, or an error that is the block's to raise
                self._is_all = False
                return False
            if isinstance(asked, Stop):
                self._mediator.has_stopped = self._is_all  # else the block itself says so
                self._error = Unwind(self._mediator) if self._is_all else None
                return False
            try:
                request = self._request(asked)
            except Exception as error:  # noqa: BLE001 - it is raised where the block asks
                error.__traceback__ = None
                self._note(self._asked_for(asked), Reply(error=error))
                return False
            part = asked.part if isinstance(asked, Wanted) else None
            if isinstance(request, Reply):
                self._note(self._asked_for(asked), _only(part, request))
                value = request.value
                continue
            self._asked = request, Line(self._file, line), part
            self._mediator.submit(request)
            return True
        return False

    def _request(self, asked: Wanted | NextStep | Made) -> Request | Reply:
        """What has to be waited for; or the reply, where it is known already."""
        mediator = self._mediator
        if isinstance(asked, Made):
            return Reply(asked.value)
        if isinstance(asked, NextStep):
            begun = mediator.expect_step(asked.step)
            return asked if begun is None else Reply(begun)
        visit = Visit(asked.site, mediator.step, asked.call)
        return Read(visit) if mediator.expect(visit) else Reply(mediator.value)

    def _asked_for(self, asked: Wanted | NextStep | Made) -> Asked:
        if isinstance(asked, Made):
            return asked.method
        if isinstance(asked, NextStep):
            return asked
        return Visit(asked.site, self._mediator.step, asked.call)

    def _note(self, asked: Asked, reply: Reply) -> None:
        self._error = reply.error
        self._answers.put(asked, reply)

    def _give_answers(self) -> None:
        """Let the block start from where it was when the forecast began."""
        if self._forecast is not None:
            self._forecast.steps.close()
            self._answers.is_as_it_was = self._forecast.is_as_it_was
            if not self._is_all:
                self._answers.look_again()
        self._forecast = None
        self._answers.is_all = self._is_all
        self._mediator.remember(self._answers)

    def _finish(self) -> None:
        self._give_answers()
        if self._is_all:
            error, self._error = self._error, None
            self._mediator.end(error)
            self._mediator.channel = None  # nothing refers in circles
        elif self._go_live is not None:
            self._go_live()
        self._go_live = None


def _only(part: Callable[[Any], Any] | None, reply: Reply) -> Reply:
    return reply if part is None or reply.error is not None else Reply(part(reply.value))


def ask_ahead(mediator: Mediator, forecast: Foretold, file: str) -> None:
    """Worker's side: have the model's side answer a whole forecast, and wait only once for it."""
    worker = mediator.channel
    assert worker is not None

    def go_live() -> None:
        mediator.channel = worker
        worker.resume_worker()

    ahead = Ahead(mediator, forecast, go_live, is_all=False, file=file)
    if ahead.begin():
        mediator.channel = ahead
        worker.suspend_worker()
