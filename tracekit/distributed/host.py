"""What every host is to its user: a model that lives elsewhere, whatever the way to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from tracekit.capture import caller_frame, is_with_item, showing_own_lines
from tracekit.distributed.errand import Errand
from tracekit.distributed.fingerprint import check_same, fingerprint_of
from tracekit.distributed.messages import Message
from tracekit.distributed.outline import model_of
from tracekit.distributed.streams import Openness, stream_from
from tracekit.errors import HostError
from tracekit.models.model import Model
from tracekit.models.streaming import Stream
from tracekit.tracing.elsewhere import Done, Work

H = TypeVar("H", bound="ModelHost")
R = TypeVar("R")
Heard = Callable[[Message], None]  # what is told of messages that come before the answer


class ModelHost(ABC):
    """`with model.trace(x, on=host):` runs the block on the model of `host`.

    `model` is one of the same architecture, with weights or without, or `host.model`; or write
    `with host.trace(x) as tracer:`. Tensors come back on the CPU, or on `device`. `timeout` is how
    many seconds a block may take (`host.within(seconds)` is this host with another limit).
    Whoever may use a host may run code on it.
    """

    def __init__(self, device: torch.device | str | None, timeout: float | None) -> None:
        self.device = device
        self.timeout = timeout
        self._known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # roots that are the host's
        self._own: Model | None = None
        self._openness = Openness()
        self.sent = 0  # bytes, in the last run
        self.received = 0

    # -- for users ------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The host's model without its weights: for paths, shapes, and traces on the host."""
        if self._own is None:
            self._openness.check()
            self._own = model_of(self._exchange(Message("outline"), None), self)
            self._known[self._own.module] = True
        return self._own

    @showing_own_lines
    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """`with host.trace(input) as tracer:` is `with host.model.trace(input, on=host)`."""
        return self.model.trace(*args, on=self, **kwargs)

    @showing_own_lines
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate on the host; as the header of a `with`, trace all steps, else the tokens."""
        if is_with_item(caller_frame()):
            return self.model.generation(*args, on=self, **kwargs)
        return self.model.generate(*args, on=self, **kwargs)

    @showing_own_lines
    def generate_stream(self, *args: Any, **kwargs: Any) -> Stream:
        """`for text in host.generate_stream(prompt, max_new_tokens=8):` gives each step's text."""
        return self.model.generate_stream(*args, on=self, **kwargs)

    @showing_own_lines
    def run(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """What `function(model, ...)` returns, called on the host, with its model.

        For all that is no block: `host.run(lambda model: model.run_with_cache("Hello"))`.
        """
        done = self.perform(Work(self.model, "", args, kwargs, function=function))
        if done.error is not None:
            raise done.error
        return done.value

    def within(self: H, seconds: float | None) -> H:
        """This host, where a block may take so many seconds; None: as long as it likes."""
        other = copy(self)
        other.timeout = seconds
        return other

    # -- for traces -----------------------------------------------------------------------------

    def perform(self, work: Work) -> Done:
        """Do the work on the host, and wait for what came of it.

        OtherModelError if the model is another one; UnsendableError for a value that can't be sent.
        """
        self._openness.check()
        return self._carry_out(self._errand(work), self._hear)

    def stream(self, work: Work) -> Stream:
        """The Stream of a generation, which begins on the host when its first item is wanted.

        Values are packed now. StreamError, at the first item, while another one is gone through.
        """
        self._openness.check()
        errand = self._errand(work)

        def carry_out(hear: Heard) -> Done:
            return self._carry_out(errand, partial(self._hear, item=hear))

        return stream_from(carry_out, errand.directory, self._openness)

    def _errand(self, work: Work) -> Errand:
        self._check(work.model)
        return Errand(work, self._hello()["python"], self.device, self.timeout, self)

    def _carry_out(self, errand: Errand, hear: Heard) -> Done:
        self.sent = errand.program.size
        answer = self._exchange(errand.program, hear)
        self.received = answer.size
        return errand.done(answer)

    def _check(self, model: Model) -> None:
        root = model.module
        if root not in self._known:
            check_same(fingerprint_of(model), self._hello()["model"], self)
            self._known[root] = True

    def _hear(self, message: Message, item: Heard | None = None) -> None:
        if message.kind == "print":
            print(message.head["text"], end="", flush=True)
        elif message.kind == "item" and item is not None:
            item(message)
        else:
            raise HostError(f"the host sent a {message.kind!r} where an answer was to come.")

    @abstractmethod
    def _hello(self) -> dict[str, Any]:
        """What the host said of itself."""

    @abstractmethod
    def _exchange(self, message: Message, hear: Heard | None) -> Message:
        """Send a message, hear what comes meanwhile, and give the answer.

        On KeyboardInterrupt the work is stopped over there, and its answer given all the same;
        also on Unwind, which `hear` raises when nobody wants what comes.
        """
