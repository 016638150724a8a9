"""What a worker may ask, what it may be told, and in which states; no threads and no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, TypeAlias

from tracekit.core.site import Visit


@dataclass(frozen=True)
class Read:
    """Let me have the value at `visit`, and the model wait until I ask for something else."""

    visit: Visit


@dataclass(frozen=True)
class Write:
    """Let the model go on with `value` at `visit`."""

    visit: Visit
    value: object


@dataclass(frozen=True)
class Skip:
    """Do not run the module at `visit` (its OUTPUT); its output is `value`."""

    visit: Visit
    value: object


@dataclass(frozen=True)
class NextStep:
    """Wake me when step `step` begins; the answer is False if the run ends before."""

    step: int


@dataclass(frozen=True)
class Sleep:
    """Wake me when `is_over()`: another block may bring it about, the model can't."""

    is_over: Callable[[], bool]
    what_for: str  # in words


Request: TypeAlias = Read | Write | Skip | NextStep | Sleep

# What requests about a value are called, for people.
KINDS: dict[type, str] = {Read: "read", Write: "write", Skip: "skip"}


class Reply(NamedTuple):  # one for each value: a dataclass costs more
    """What comes back for a request: a value, or an error to raise at the line that asked."""

    value: object = None
    error: BaseException | None = None


class Unwind(BaseException):
    """Leave the block or the forward pass now. A BaseException, so that `except Exception` in
    the user's block or in a model's forward cannot eat it. `owner` is the mediator of the block
    that is to be left, for a `with` around it to know its own."""

    def __init__(self, owner: object = None) -> None:
        super().__init__()
        self.owner = owner


class StepOver(Unwind):
    """Leave the block, as its step is over: it begins anew in the next one, if there is one."""


class State(Enum):
    """The states of a mediator."""

    READY = auto()  # its block has not begun
    RUNNING = auto()  # its worker runs, the model waits
    WAITING = auto()  # its worker is parked on a request, the model runs
    DONE = auto()  # its block has ended, or failed, or was stopped


class Move(Enum):
    """What takes a mediator from one state to another."""

    START = auto()
    ASK = auto()
    ANSWER = auto()
    END = auto()


# Every legal move; any other is a KeyError here, and nowhere else.
TRANSITIONS: dict[tuple[State, Move], State] = {
    (State.READY, Move.START): State.RUNNING,
    (State.RUNNING, Move.ASK): State.WAITING,
    (State.WAITING, Move.ANSWER): State.RUNNING,
    (State.RUNNING, Move.END): State.DONE,
}
