"""Keeps one worker: starts it, gives it programs, and replaces it when it hangs or dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, Final, TypeAlias, final

import cloudpickle

from tracekit.distributed.messages import Message
from tracekit.distributed.wire import receive, send
from tracekit.distributed.worker import work
from tracekit.errors import HostError, LoadingError
from tracekit.models.model import Model

GRACE: Final = 5.0  # seconds between asking a block to stop and killing its process

Pipe: TypeAlias = "Connection[Any, Any]"


class Worker(ABC):
    """What holds the model, at the other end of a connection."""

    pipe: Pipe

    @abstractmethod
    def kill(self) -> bool:
        """End it now; False if that can't be done."""

    @abstractmethod
    def death(self) -> str:
        """How it ended, for people."""


@final
class Process(Worker):
    """A worker in a process of its own, which can be killed."""

    def __init__(self, make: Callable[[], Model]) -> None:
        ours, theirs = _pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        number = theirs.fileno()
        start = "from tracekit.distributed.worker import main; main()"
        command = [sys.executable, "-c", start, str(number)]
        self._process = subprocess.Popen(
            command,
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for this process; it says what becomes of a block
        )
        theirs.close()
        self.pipe = ours
        ours.send_bytes(cloudpickle.dumps(make))

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def kill(self) -> bool:
        self._process.kill()
        self._process.wait()
        self.pipe.close()
        return True

    def death(self) -> str:
        code = self._process.wait(GRACE)
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@final
class Thread(Worker):
    """A worker in this process, for a model that lives here; it can't be killed."""

    def __init__(self, make: Callable[[], Model]) -> None:
        self.pipe, theirs = _pipe()
        self._thread = threading.Thread(target=work, args=(theirs, make, False), daemon=True)
        self._thread.start()

    def kill(self) -> bool:
        return False

    def death(self) -> str:
        return "its thread ended"


def _pipe() -> tuple[Pipe, Pipe]:
    one, other = socket.socketpair()
    return Connection(one.detach()), Connection(other.detach())


@final
class Supervisor:
    """`answer = supervisor.exchange(message, tell, client)`, from one thread at a time."""

    def __init__(self, start: Callable[[], Worker], max_seconds: float | None = None) -> None:
        self._start = start
        self._max_seconds = max_seconds
        self._worker: Worker | None = None
        self._hello: Message | None = None

    def ready(self) -> Message:
        """The worker's hello; starts it if there is none. LoadingError if it has no model."""
        if self._worker is None or self._hello is None:
            self._worker = self._start()
            try:
                hello = receive(self._worker.pipe)
            except (EOFError, OSError):
                raise LoadingError(f"the worker ended early: {self._lost()}.") from None
            if hello.kind == "failed":
                self.close()
                raise LoadingError(f"the model of the host can't be made: {hello.head['text']}")
            self._hello = hello
        return self._hello

    @property
    def worker(self) -> Worker | None:
        """The one that there is now."""
        return self._worker

    def exchange(
        self, message: Message, tell: Callable[[Message], None], client: Pipe | None = None
    ) -> Message:
        """The worker's answer, or a "failure" that says what became of it.

        `tell` has what comes before; a "stop" that comes from `client`, or its end, is obeyed.
        """
        hello = self.ready()
        if message.kind == "hello":
            return hello
        assert self._worker is not None
        try:
            send(self._worker.pipe, message)
            return _Watch(self._worker, message, self._max_seconds).answer(tell, client)
        except _HangsError as hang:
            return self._replaced(hang.seconds)
        except (EOFError, OSError):
            how = self._lost()
            text = (
                f"the worker of the host died while it ran this block ({how}): what it had bound "
                f"is lost. The next block runs, in a new worker."
            )
            return Message("failure", {"kind": "host", "text": text})

    def _replaced(self, seconds: float | None) -> Message:
        assert self._worker is not None
        asked = "to stop" if seconds is None else f"to end after {seconds:g} seconds"
        kind = "host" if seconds is None else "time"
        if self._worker.kill():
            self._worker = self._hello = None
            text = (
                f"the block was asked {asked} and did not, as it was in code that is not Python: "
                f"its worker was killed, and what it had bound is lost. The next block runs, in a "
                f"new worker."
            )
            return Message("failure", {"kind": kind, "text": text})
        text = (
            f"the block was asked {asked} and did not, and the host can't kill it, as it is a "
            f"thread of the process that serves: serve a model by name to have a process for it."
        )
        return Message("failure", {"kind": kind, "text": text})

    def _lost(self) -> str:
        worker, self._worker, self._hello = self._worker, None, None
        assert worker is not None
        how = worker.death()
        worker.pipe.close()
        return how

    def close(self) -> None:
        """End the worker."""
        worker, self._worker, self._hello = self._worker, None, None
        if worker is not None and not worker.kill():
            worker.pipe.close()


class _HangsError(Exception):
    """The block goes on though it was asked to stop; `seconds` is the limit it had, if any."""

    def __init__(self, seconds: float | None) -> None:
        super().__init__()
        self.seconds = seconds


@final
class _Watch:
    """Waits for one answer."""

    def __init__(self, worker: Worker, message: Message, max_seconds: float | None) -> None:
        own = message.head.get("timeout")
        limits = [each for each in (own, max_seconds) if each is not None]
        self._seconds = min(limits) if limits else None
        self._worker = worker
        self._deadline = None if self._seconds is None else monotonic() + self._seconds + GRACE
        self._was_stopped = False

    def answer(self, tell: Callable[[Message], None], client: Pipe | None) -> Message:
        pipe = self._worker.pipe
        listening: list[Any] = [pipe] if client is None else [pipe, client]
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - monotonic())
            ready = wait(listening, left)
            if not ready:
                raise _HangsError(None if self._was_stopped else self._seconds)
            if client in ready:
                self._stop()
                if not _heard_stop(client):
                    listening.remove(client)
            if pipe in ready:
                message = receive(pipe)
                if message.kind not in ("print", "item"):
                    return message
                if client in listening or client is None:
                    tell(message)

    def _stop(self) -> None:
        if not self._was_stopped:
            self._was_stopped = True
            self._deadline = monotonic() + GRACE
            send(self._worker.pipe, Message("stop"))


def _heard_stop(client: Any) -> bool:
    """Whether the client said something; False if it is gone."""
    try:
        return receive(client).kind == "stop"
    except (EOFError, OSError):
        return False


def failure(error: BaseException) -> Message:
    """An error of the host itself, for the client."""
    kind = "loading" if isinstance(error, LoadingError) else "host"
    slug = f" [{getattr(error, 'slug', '')}]"
    text = str(error).removesuffix(slug)
    if not isinstance(error, (HostError, LoadingError)):
        text = f"the host failed: {type(error).__name__}: {text}"
    return Message("failure", {"kind": kind, "text": text})
