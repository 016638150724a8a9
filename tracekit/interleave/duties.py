"""What a mediator leaves to others: its run, its worker, the names and the rows of its block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tracekit.core.site import Visit

if TYPE_CHECKING:
    from tracekit.interleave.interleaver import Interleaver
    from tracekit.interleave.mediator import Mediator


class Run(Protocol):
    """What a mediator needs to know of its run (an Interleaver)."""

    @property
    def steps_begun(self) -> int:
        """How many steps are known to have begun."""
        ...

    def count_steps(self, line: str) -> int:
        """How many steps the run will have, for the block at `line`; StepError if that is open."""
        ...

    def expect(self, mediator: Mediator, visit: Visit) -> None:
        """Prepare for `visit`, or raise if it can't be served any more."""
        ...

    def expect_skip(self, mediator: Mediator, visit: Visit) -> None:
        """Prepare to skip the module at `visit`, or raise if it has begun."""
        ...

    def expect_step(self, step: int) -> bool | None:
        """Prepare for `step`: True if it is the current one, None if it may come, else False."""
        ...

    def ran_in(self, path: str, step: int) -> bool | None:
        """Whether the module at `path` ran in `step`, the current or the last; None: not known."""
        ...

    def note_sleep(self, mediator: Mediator) -> None:
        """`mediator` is about to sleep for what another block does."""
        ...

    def is_open(self, mediator: Mediator, visit: Visit) -> bool:
        """Whether the call of `visit` (INPUT) has begun, with its operations watched."""
        ...

    def open_source(self, mediator: Mediator, path: str) -> object:
        """The operations of what runs at `path`, sites from now on, or raise if it runs already."""
        ...

    def edit_at_positions(self, mediator: Mediator, edit: object, line: str) -> None:
        """Make an edit of tokens, in all forwards to come."""
        ...

    def hand_out(self, visit: Visit, value: object, whole: object, is_own: bool) -> None:
        """A block may change `value`, a part of `whole`, or written by itself if `is_own`."""
        ...

    def take_back(self, visit: Visit, value: object, is_other: bool) -> object:
        """What the model goes on with from `visit`: `value`, which a block wrote if `is_other`."""
        ...


class Channel(Protocol):
    """The hand-over between the model's side and one worker's side (a Baton with its Worker)."""

    def resume_worker(self) -> None:
        """Model's side: let the worker run until it suspends or ends."""
        ...

    def suspend_worker(self) -> None:
        """Worker's side: let the model run until it resumes this worker."""
        ...


class Scope(Protocol):
    """What has to be in place while a block runs (its names)."""

    def enter(self) -> None:
        """Model's side: a turn of the block begins."""
        ...

    def leave(self) -> None:
        """Model's side: the turn is over."""
        ...

    def wait_for(self, name: str, sleep: Callable[[Callable[[], bool], str], None]) -> None:
        """Worker's side: wait for a name that another block binds."""
        ...

    def meet(self) -> None:
        """Worker's side: the block has met others, and sees what they bound."""
        ...


class Keeper(Protocol):
    """Notes what a block does to the values that it is given."""

    def begin(self, visit: Visit, value: object) -> None:
        """Model's side: the block is about to be given `value`."""
        ...

    def came(self, kind: str, value: object, line: str) -> None:
        """Worker's side: what it asked for at `line` is there, or what it wrote."""
        ...

    def again(self, value: object, line: str) -> None:
        """Worker's side: it asks once more for the value that it has."""
        ...

    def wrote(self, now: object, new: object, line: str) -> None:
        """Worker's side: it writes `new` in the place of `now`."""
        ...

    def prepared(self, value: object) -> None:
        """Worker's side: what was written last was put there for it, and is no edit yet."""
        ...

    def end(self, value: object) -> None:
        """Model's side: this is what it left."""
        ...


class Part(Protocol):
    """The part of a value that a block sees."""

    @property
    def value(self) -> object: ...

    @property
    def whole(self) -> object:
        """What the model has, and in whose memory edits in place are made."""
        ...

    def put_back(self, new: object) -> object:
        """The whole value, with `new` in the place of the part; Unsettled if that is another."""
        ...


class Placement(Protocol):
    """Reaches into the model (hooks.Hooks)."""

    def make_skippable(self, path: str) -> None:
        """Let the interleaver answer in place of a module."""
        ...

    def show(self, visit: Visit, value: object) -> None:
        """Show the observers a value that they would not see, as the run stops there."""
        ...

    def opened(self, path: str) -> object:
        """The operations of what runs at `path`, or None if it was not opened."""
        ...

    def open(self, path: str) -> object:
        """Make sites of the operations of what runs at `path`; SourceError if that can't be."""
        ...


class Together(Protocol):
    """What the ranks of a model that lies on several do together, in one run."""

    def serve(
        self, run: Interleaver, visit: Visit, value: object, asking: Sequence[Mediator]
    ) -> object:
        """Have `asking` served the whole of `value`; what the model goes on with."""
        ...

    def shown(self, visit: Visit, value: object) -> object:
        """What blocks are shown of a value that the model does not go on with."""
        ...

    def end(self) -> None:
        """The run is over, with nothing left to ask."""
        ...

    def leave(self, is_by_block: bool) -> None:
        """This rank leaves the run; unless it has ended, the others learn that."""
        ...


class Unsettled(ABC):
    """A value of which blocks have replaced their parts, before it is put together."""

    @abstractmethod
    def settled(self) -> object:
        """What the model goes on with."""


class Span(NamedTuple):
    """The rows `start` to `stop` of a batch of `size`."""

    start: int
    stop: int
    size: int

    def of(self, rows: int) -> slice:
        """Where they are if each row of the batch became several, as with beams."""
        return slice(self.start * rows // self.size, self.stop * rows // self.size)


class Rows(Protocol):
    """Which part of each value belongs to a block."""

    @property
    def is_all(self) -> bool:
        """Whether it is all of it."""
        ...

    def narrow(self, visit: Visit, whole: object) -> Part:
        """The part of `whole`; RowsError if it can't be told."""
        ...

    @property
    def span(self) -> Span:
        """Where the part lies."""
        ...
