"""Runs programs on the model of a host, one at a time: the same whatever brings them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from types import CodeType
from typing import Any, Final, final

import torch

from tracekit.capture import HAND_BACK, TRACE, Shipped, compiled, function_of, lines_shown
from tracekit.distributed.directory import ModelDirectory
from tracekit.distributed.errand import OF_A_NAME, python_here
from tracekit.distributed.failures import failure_of
from tracekit.distributed.fingerprint import fingerprint_of
from tracekit.distributed.kinds import has_changed, snapshot
from tracekit.distributed.messages import Message
from tracekit.distributed.opaque import changed_ones, digests, told
from tracekit.distributed.outline import outline_of
from tracekit.distributed.parcel import Packer, Parcel, Unpacker
from tracekit.distributed.stopping import Stoppable
from tracekit.distributed.streams import METHOD as STREAM
from tracekit.distributed.streams import emit_items, gains_of
from tracekit.errors import HostError, RemoteError, TimeLimitError
from tracekit.models.model import Model
from tracekit.models.streaming import Stream
from tracekit.tracing.tracer import Tracer

_UNSENT: Final = object()  # stands for what the block may only delete
_METHODS: Final = ("trace", "generation")

Emit = Callable[[Message], None]


@final
class Executor:
    """The model of a host, and what runs on it."""

    def __init__(self, model: Model, max_seconds: float | None = None) -> None:
        self.model = model
        self._max_seconds = max_seconds
        self._running: Stoppable | None = None

    def hello(self) -> Message:
        """What a client is told of this host: the model, and the Python that runs its blocks."""
        head = {"python": python_here(), "torch": str(torch.__version__)}
        return Message("hello", {**head, "model": fingerprint_of(self.model)})

    def stop(self, why: str = "stop") -> None:
        """Interrupt the block that runs, if one does; from any thread."""
        running = self._running
        if running is not None:
            running.stop(why)

    def respond(self, message: Message, emit: Emit | None = None) -> Message:
        """The answer to any message of a client."""
        if message.kind == "hello":
            return self.hello()
        if message.kind == "outline":
            return outline_of(self.model)
        if message.kind == "program":
            return self.perform(message, emit)
        raise HostError(f"a host runs programs, and was sent a {message.kind!r}.")

    def perform(self, program: Message, emit: Emit | None = None) -> Message:
        """What came of a program; its errors are in the answer."""
        job = _Job(self.model, program, emit)
        limits = [each for each in (program.head["timeout"], self._max_seconds) if each is not None]
        error: BaseException | None = None
        running = Stoppable(min(limits) if limits else None)
        self._running = running
        try:
            with running:
                job.run()
        except BaseException as caught:  # noqa: BLE001 - it is raised again on the client
            error = caught
            if running.why == "time" and isinstance(caught, KeyboardInterrupt):
                error = TimeLimitError(
                    f"the block took longer than the {min(limits):g} seconds it was given on its "
                    f"host, and was stopped there; what it had bound until then is bound here."
                ).with_traceback(caught.__traceback__)
        finally:
            self._running = None
        try:
            return job.answer(error)
        finally:
            del error


@final
class _Job:
    """One program: its values, its run, its answer."""

    def __init__(self, model: Model, program: Message, emit: Emit | None) -> None:
        self._model = model
        self._head = program.head
        self._emit = emit
        self._parcel = Parcel.of(bytes(program.buffers[0]), list(program.buffers[1:]))
        self._directory = ModelDirectory(model, False)
        self._unpacker = Unpacker(self._parcel, self._directory)
        self._before: list[object] = []  # how each object was
        self._digests: dict[int, object] = {}  # of those that only pickle can tell of
        self._given: dict[str, Any] = {}  # names, as they were
        self._bound: dict[str, Any] = {}  # names, as they are
        self._code: CodeType | None = None
        self._value: Any = None
        self._gone: list[str] = []  # names that the block unbound
        block = self._head["block"]
        self._block = None if block is None else _shipped(block)

    def run(self) -> None:
        """Do what the program says; the user's exceptions propagate."""
        args, kwargs = self._load("args"), self._load("kwargs")
        function = self._load("function") if "function" in self._parcel.names else None
        self._given = {
            key.removeprefix(OF_A_NAME): self._load(key)
            for key in self._parcel.names
            if key.startswith(OF_A_NAME)
        }
        directory = self._directory
        self._before = [snapshot(value, directory.state_of) for value in self._unpacker.objects]
        self._digests = digests(self._unpacker.objects, directory)
        method = self._head["method"]
        with _modes(self._head["modes"]):
            if self._block is not None:
                with lines_shown(self._block):
                    self._run_block(self._block, getattr(self._model, method)(*args, **kwargs))
            elif function is not None and method in _METHODS:
                self._value = getattr(self._model, method)(*args, **kwargs).run(function)
            elif function is not None:
                self._value = function(self._model, *args, **kwargs)
            elif method == STREAM:
                self._stream(self._model.generate_stream(*args, **kwargs))
            else:
                self._value = getattr(self._model, method)(*args, **kwargs)

    def _stream(self, stream: Stream) -> None:
        assert self._emit is not None
        try:
            emit_items(stream, self._directory, self._emit)
        finally:
            self._bound = gains_of(stream)

    def _load(self, key: str) -> Any:
        try:
            return self._unpacker.value(key)
        except ImportError as error:
            is_name = key.startswith(OF_A_NAME)
            what = f"the block uses {key[len(OF_A_NAME) :]!r}, which" if is_name else f"its {key}"
            raise RemoteError(
                f"{what} needs a module that the host does not have ({error}): install it there, "
                f"define what you need of it in the file or notebook of the block, or say "
                f"cloudpickle.register_pickle_by_value(module) here."
            ) from error

    def _run_block(self, block: Shipped, trace: Any) -> None:
        code = self._code = compiled(block)
        namespace = self._unpacker.namespace(block.module)
        self._given = {**dict.fromkeys(block.may_unbind, _UNSENT), **self._given}
        inside = {*block.parameters, *block.may_unbind} if block.is_in_function else set[str]()
        namespace.update({name: self._given[name] for name in self._given if name not in inside})
        before = dict(namespace)
        run: Callable[[], Any] = partial(exec, code, namespace)
        namespace |= {TRACE: trace, HAND_BACK: self._bound.update}
        if block.is_in_function:
            run()
            function = function_of(block, namespace)
            self._code = function.__code__
            run = partial(function, **{name: self._given[name] for name in inside})
        try:
            run()
        finally:
            new = {name: it for name, it in namespace.items() if before.get(name, run) is not it}
            self._bound = {**new, **self._bound}
            there = {*namespace, *self._bound}
            self._gone = [name for name in block.may_unbind if name not in there]

    # -- the answer -----------------------------------------------------------------------------

    def answer(self, error: BaseException | None) -> Message:
        """Names, changed objects, the value and the error, each as far as it can be sent."""
        same_python = self._head["python"] == python_here()
        packer = Packer(self._directory, self._unpacker.objects, same_python)
        left: dict[str, str] = {}
        for name, value in self._new_names().items():
            reason = _add(packer, OF_A_NAME + name, value)
            if reason is not None:
                left[name] = reason
        reason = None if self._value is None else _add(packer, "value", self._value)
        if reason is not None:
            left["value"] = reason
        if error is not None:
            _add(packer, "error", (type(error), error.args, dict(vars(error))))
        for number, before in enumerate(self._before):
            value = self._unpacker.objects[number]
            if has_changed(value, before, self._directory.state_of):
                packer.note_change(number, value)
        failure = None if error is None else asdict(failure_of(error, self._code))
        lost = changed_ones(self._digests, self._unpacker.objects, self._directory)
        head = {"failure": failure, "left": left, "removed": self._gone}
        head["lost"] = [name for name in (told(value, self._given) for value in lost) if name]
        return Message("answer", head, [packer.parcel.index(), *packer.parcel.buffers])

    def _new_names(self) -> dict[str, Any]:
        hidden = {"__builtins__", "__name__", "__annotations__", TRACE, HAND_BACK}
        return {
            name: value
            for name, value in self._bound.items()
            if name not in hidden
            and value is not _UNSENT
            and not (name in self._given and self._given[name] is value)
            and not isinstance(value, Tracer)  # that of the block: the user has one
        }


def _add(packer: Packer, key: str, value: object) -> str | None:
    """Put a value in; why not, if it can't be sent."""
    try:
        packer.add(key, value)
    except Exception as error:  # noqa: BLE001 - whatever the pickling of a user's object raises
        packer.parcel.names.pop(key, None)
        return f"a {type(value).__name__}: {error}"
    return None


def _shipped(told: dict[str, Any]) -> Shipped:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told.items()
    }
    return Shipped(**fields)


@contextmanager
def _modes(modes: dict[str, Any]) -> Generator[None]:
    """The torch modes of the client's thread."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(modes["inference"]))
        stack.enter_context(torch.set_grad_enabled(modes["grad"]))
        for device, dtype in modes["autocast"].items():
            stack.enter_context(torch.autocast(device, dtype=getattr(torch, dtype)))
        yield
