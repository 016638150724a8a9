"""A trace whose block runs on another model, in another process: what is sent, what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, final

from tracekit.capture import Block, Shipped, Skip, capture, hand_back, ship, skip_body
from tracekit.errors import CaptureError, InputError
from tracekit.tracing.ways import Way

_WAY_OUT = (
    "a block that runs elsewhere is sent as text: put it into a file or a notebook's cell, or "
    "write it as a function, `model.trace(x, on=host).run(function)`"
)


@final
@dataclass(frozen=True)
class Work:
    """What a host is to do with its model: run a block, a function beside it, or a call alone."""

    model: Any  # the client's, whose modules stand for the host's
    method: str  # "trace", "generation", or another one, or "" for the function alone
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    block: Shipped | None = None
    names: Mapping[str, object] = field(default_factory=dict[str, object])
    function: Callable[..., Any] | None = None


@final
@dataclass(frozen=True)
class Done:
    """What came of it: the names that the block bound, also where it ended with an error."""

    names: Mapping[str, object] = field(default_factory=dict[str, object])
    removed: tuple[str, ...] = ()  # names that it unbound
    value: Any = None  # of a function, or a call
    error: BaseException | None = None


class Host(Protocol):
    """A model that lives elsewhere (tracekit.distributed has those there are)."""

    def perform(self, work: Work) -> Done:
        """Do the work, and wait for what came of it; its error is in what is returned."""
        ...

    def stream(self, work: Work) -> Any:
        """The Stream of a generation that is to be gone through step by step."""
        ...


@final
class Elsewhere(Way):
    """A block that is kept from running where it stands, and sent to a host."""

    told = "The block was sent to a host, as text, and ran beside the model there."

    def __init__(self, block: Block, frame: FrameType, entered: object, sent: Sent) -> None:
        self._sent = sent
        self._block = block
        self._frame: FrameType | None = frame
        self._skip: Skip | None = None
        if not block.is_empty:
            self._skip = skip_body(block, frame, entered=entered)

    def is_own(self, error: BaseException | None) -> bool:
        self._restore()
        return self._skip is not None and self._skip.is_own(error)

    def abandon(self, error: BaseException) -> None:
        self._restore()
        self._frame = None

    def finish(self) -> BaseException | None:
        self._restore()
        frame, self._frame = self._frame, None
        assert frame is not None
        try:
            shipped, names = ship(self._block, frame)
            done = self._sent.perform(block=shipped, names=names)
            hand_back(self._block, frame, done.names, done.removed)
        except Exception as error:  # noqa: BLE001 - it is raised at the user's `with`
            return error
        finally:
            del frame
        return done.error

    def _restore(self) -> None:
        if self._skip is not None:
            self._skip.restore()


@final
@dataclass(frozen=True)
class Sent:
    """The call of a trace that a host makes."""

    host: Host
    model: Any
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def perform(self, **more: Any) -> Done:
        """What the host made of it."""
        return self.host.perform(Work(self.model, self.method, self.args, self.kwargs, **more))

    def way(self, frame: FrameType, entered: object) -> tuple[Block, Elsewhere]:
        """The block of the `with` that `frame` enters, and how it runs."""
        try:
            block = capture(frame)
        except CaptureError as error:
            text = str(error).removesuffix(f" [{error.slug}]")
            raise CaptureError(f"{text}; {_WAY_OUT}") from None
        return block, Elsewhere(block, frame, entered, self)

    def run(self, function: Callable[..., Any] | None, declared: bool) -> Any:
        """What the function, run in the place of a block on the host, returned."""
        if function is None or declared:
            raise InputError(
                "tracer.run(capture=..., edits=...) is for this process: on a host, run a function "
                "(`.run(function)`), or `host.run(lambda model: model.run(...))`."
            )
        done = self.perform(function=function)
        if done.error is not None:
            raise done.error
        return done.value


def called_on(model: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a method of the host's model returns; the host is the option `on`."""
    given = dict(kwargs)
    done = given.pop("on").perform(Work(model, method, args, given))
    if done.error is not None:
        raise done.error
    return done.value


def streamed_on(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The stream of the host's model; the host is the option `on`."""
    given = dict(kwargs)
    return given.pop("on").stream(Work(model, "generate_stream", args, given))
