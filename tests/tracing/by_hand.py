"""The independent way to run a random program: hand-written hooks on every module of the model.

A program is a generator that yields what it waits for and is sent a Pause when the model is there.
Nothing of tracekit is used but the classes of its errors.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from tests.tracing.plain import copied
from tracekit.errors import NeverRanError, SiteOrderError, StepError


class Visit(NamedTuple):
    """A call of a module, before (`input`) or after (`output`) it runs."""

    path: str
    side: str
    step: int = 0
    call: int = 0


class AtVisit(NamedTuple):
    """Wait until the model is at a visit."""

    visit: Visit


class Skipping(NamedTuple):
    """Wait until the call of an (output) visit is about to begin, and put `value` in its place."""

    visit: Visit
    value: Any


class AtStep(NamedTuple):
    """Wait until a step begins; sent False if there is no such step."""

    step: int


class AtEnd(NamedTuple):
    """Wait for what the traced call returns."""


@dataclass
class Pause:
    """The model stands still at a visit; what is put into `value` is what it goes on with."""

    value: Any
    is_first: bool = False  # nothing of the program has been there before
    is_written: bool = False  # with a value from elsewhere, if it is the same object, too


Program: TypeAlias = Generator[Any, Any, None]


class Leave(BaseException):
    """Out of the model: the program failed or has stopped."""


@dataclass
class Seen:
    """A tensor that the program was given, and what it was when the model went on."""

    tensor: Tensor
    numbers: Any
    version: int | None

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        version = None if tensor.is_inference() else tensor._version
        return Seen(tensor, copied(tensor), version)

    def has_changed(self) -> bool:
        return not same_numbers(self.tensor, self.numbers)

    def was_written(self) -> bool:
        return self.has_changed() or (
            self.version is not None and self.tensor._version != self.version
        )


def same_numbers(one: Tensor, other: Tensor) -> bool:
    one = one.detach()
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 - nan


@dataclass
class Outcome:
    """What came of a run by hand."""

    failure: BaseException | None = None
    result: Any = None
    has_stopped: bool = False
    visits: list[Visit] = field(default_factory=list)
    given: list[Seen] = field(default_factory=list)  # everything that the program saw or wrote
    stored: list[Seen] = field(default_factory=list)  # what it stored of the model's memory
    finals: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)  # step, output
    final_inputs: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


def with_own_memory(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(with_own_memory, value))
    if isinstance(value, dict):
        items = {name: with_own_memory(item) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value


def storages(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_in(value)}


class ByHand:
    """Runs `program` beside `call()`, by hooks of its own on every module of `model`."""

    def __init__(
        self, model: nn.Module, program: Program, stored: Callable[[], Any] = lambda: None
    ) -> None:
        self._model = model
        self._program = program
        self._stored = stored  # what the program has stored so far
        self._known: set[int] = set()  # of these, by id, and of the memory of what it read
        self._memory: set[int] = set()
        self._wanted: Any = None
        self._is_over = False
        self._step = -1
        self._begun: Counter[str] = Counter()
        self._running: dict[str, list[int]] = defaultdict(list)
        self._passed: set[Visit] = set()
        self._skipped: set[str] = set()  # paths, in this step
        self._at: Visit | None = None
        self._fresh: list[Tensor] = []
        self._has_answered: Visit | None = None  # a skip
        self._is_quiet = False
        self.outcome = Outcome()

    def run(self, call: Callable[[], Any]) -> Outcome:
        """Run it; hooks are on the model meanwhile."""
        undo = self._place()
        try:
            self._go_on(None)
            self.outcome.result = call()
            self._at = None
            self._finish()
        except Leave:
            pass
        finally:
            for take_off in undo:
                take_off()
            self._program.close()
        return self.outcome

    def aside(self, call: Callable[[], Any]) -> Any:
        """Call a module in the program, with the hooks looking away."""
        self._is_quiet = True
        try:
            return call()
        finally:
            self._is_quiet = False

    # -- hooks ----------------------------------------------------------------------------------

    def _place(self) -> list[Callable[[], None]]:
        undo: list[Callable[[], None]] = []
        for path, module in self._model.named_modules():
            before, after = self._before(path), self._after(path)
            handles = [
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                module.register_forward_pre_hook(self._observe_inputs(path), with_kwargs=True),
                module.register_forward_hook(after, prepend=True),
                module.register_forward_hook(self._observe(path)),
            ]
            undo += [handle.remove for handle in handles]
            undo.append(self._patch(path, module))
        return undo

    def _before(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._is_quiet:
                return None
            if path == "":
                self._begin_step()
            call = self._begun[path]
            self._begun[path] += 1
            self._running[path].append(call)
            return self._reach(Visit(path, "input", self._step, call), (args, kwargs))

        return hook

    def _after(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            if self._is_quiet:
                return None
            call = self._running[path].pop()
            return self._reach(Visit(path, "output", self._step, call), output)

        return hook

    def _observe(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if not self._is_quiet:
                self.outcome.finals.setdefault(path, []).append((self._step, copied(output)))

        return hook

    def _observe_inputs(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._is_quiet:
                seen = (self._step, copied((args, kwargs)))
                self.outcome.final_inputs.setdefault(path, []).append(seen)

        return hook

    def _patch(self, path: str, module: nn.Module) -> Callable[[], None]:
        forward = module.forward

        @wraps(forward)
        def answered(*args: Any, **kwargs: Any) -> Any:
            wanted = self._wanted
            if isinstance(wanted, Skipping) and not self._is_quiet:
                call = self._running[path][-1]
                if wanted.visit == Visit(path, "output", self._step, call):
                    self._skipped.add(path)
                    self._has_answered = wanted.visit
                    return wanted.value
            return forward(*args, **kwargs)

        module.forward = answered
        return lambda: module.__dict__.pop("forward")

    # -- the program beside the model -----------------------------------------------------------

    def _begin_step(self) -> None:
        self._step += 1
        self._begun.clear()
        self._passed.clear()
        self._skipped.clear()
        if isinstance(self._wanted, AtStep) and self._wanted.step <= self._step:
            self._go_on(True)

    def _reach(self, visit: Visit, value: Any) -> Any:
        self.outcome.visits.append(visit)
        self._passed.add(visit)
        self._at, pause = visit, Pause(value, is_first=True)
        while isinstance(self._wanted, (AtVisit, Skipping)) and self._wanted.visit == visit:
            self._fresh += tensors_in(pause.value)
            self._memory |= storages(pause.value)
            self._go_on(pause)
            pause.is_first = False
        if pause.value is not value or pause.is_written or self._has_answered == visit:
            pause.value = with_own_memory(pause.value)  # the model may write into it
        self.outcome.given += map(Seen.of, self._fresh)
        self._fresh = []
        self._at = None
        for tensor in tensors_in(self._stored()):
            if id(tensor) not in self._known:
                self._known.add(id(tensor))
                if storages(tensor) & self._memory:
                    self.outcome.stored.append(Seen.of(tensor))
        return pause.value

    def _finish(self) -> None:
        self._is_over = True
        while self._wanted is not None:
            wanted = self._wanted
            if isinstance(wanted, AtStep):
                self._go_on(False)
            elif isinstance(wanted, AtEnd):
                self._go_on(Pause(self.outcome.result))
            else:
                steps = {visit.step for visit in self.outcome.visits}
                has_step = wanted.visit.step in steps
                self._go_on(NeverRanError("") if has_step else StepError(""))

    def _go_on(self, sent: Any) -> None:
        """Let the program run until it waits for something that is still to come."""
        try:
            while True:
                if isinstance(sent, BaseException):
                    self._wanted = self._program.throw(sent)
                else:
                    self._wanted = self._program.send(sent)
                sent = self._refusal(self._wanted)
                if sent is None:
                    return
        except StopIteration:
            self._wanted = None
        except BaseException as error:
            self._wanted = None
            if isinstance(error, Leave):
                self.outcome.has_stopped = True
            else:
                self.outcome.failure = error
            raise Leave from None

    def _refusal(self, wanted: Any) -> Any:
        """An answer that needs no waiting: an error, or that the step has begun."""
        if isinstance(wanted, AtEnd):
            return None
        step = max(self._step, 0)
        if isinstance(wanted, AtStep):
            if self._is_over:
                return False
            if wanted.step < step:
                return StepError("")
            return True if wanted.step == step else None
        visit = wanted.visit
        if isinstance(wanted, Skipping):
            visit = visit._replace(side="input")
        if visit == self._at:
            return None
        if visit in self._passed and visit.step == step:
            return SiteOrderError("")
        if visit.step == step and any(is_inside(visit.path, above) for above in self._skipped):
            return NeverRanError("")
        if self._is_over or visit.step < step:
            return SiteOrderError("")
        return None


def is_inside(path: str, above: str) -> bool:
    return path != above and (above == "" or path.startswith(above + "."))
