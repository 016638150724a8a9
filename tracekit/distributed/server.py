"""`tracekit.serve(model)`: a host that listens on a socket, for clients that have its key."""

# Whoever has the key runs code on this machine: that is what a host is for. So there is no host
# without a key, and it listens on loopback unless it is told otherwise.

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener, answer_challenge, deliver_challenge
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, cast, final

from tracekit.capture import showing_own_lines, warn_user
from tracekit.distributed.messages import Message
from tracekit.distributed.supervisor import Pipe, Process, Supervisor, Thread, Worker, failure
from tracekit.distributed.wire import hurry, receive, send
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel
from tracekit.models.model import Model

if TYPE_CHECKING:
    from collections.abc import Generator

_LOOPBACK: Final = ("127.", "localhost", "::1")
Address = tuple[str, int]


@showing_own_lines
def serve(
    model: Model | str | Path | Callable[[], Model],
    address: Address = ("127.0.0.1", 0),
    *,
    key: str | bytes | None = None,
    timeout: float | None = None,
    **options: Any,
) -> Server:
    """`with serve("gpt2") as server:` lets clients trace a model of this machine.

    `connect(server.address, server.key)` is a client's host; port 0 is any that is free. The model
    is a name (with `options` as LanguageModel takes them) or a function that makes one: then it
    lives in a process of its own, which is replaced when a block hangs or kills it. A live model is
    served by a thread of this process. `timeout` is the most seconds that a block may have.

    The key is made here if none is given. Whoever has it may run any code on this machine.
    """
    make, start = _maker(model, options)
    return Server(Supervisor(partial(start, make), timeout), address, _checked_key(key))


def _maker(
    model: object, options: dict[str, Any]
) -> tuple[Callable[[], Model], Callable[[Callable[[], Model]], Worker]]:
    if isinstance(model, Model):
        if options:
            raise InputError(f"a live model takes no loading options: {', '.join(options)}.")
        return (lambda: model), Thread
    if isinstance(model, (str, Path)):
        return partial(LanguageModel, str(model), **options), Process
    if callable(model):
        return cast("Callable[[], Model]", model), Process
    raise InputError(
        f"serve() takes a model, its name, or a function that makes one, not "
        f"{type(model).__name__}."
    )


def _checked_key(key: str | bytes | None) -> bytes:
    if key is None:
        return secrets.token_urlsafe(24).encode()
    found = key.encode() if isinstance(key, str) else key
    if not found:
        raise InputError("the key is empty: give one that is hard to guess, or leave it out.")
    return found


@final
class Server:
    """A host on a socket, from when it is made until `close()`; its clients take turns."""

    def __init__(self, supervisor: Supervisor, address: Address, key: bytes) -> None:
        self.key = key.decode(errors="replace")
        self._key = key
        self._supervisor = supervisor
        supervisor.ready()
        if not address[0].startswith(_LOOPBACK):
            warn_user(
                f"this host listens on {address[0]}, not on this machine alone: whoever reaches it "
                f"and has its key may run any code here, and what is sent is not encrypted. Prefer "
                f"127.0.0.1 with an SSH tunnel (ssh -L)."
            )
        self._listener = Listener(address, "AF_INET", backlog=16)
        self.address: Address = cast("Address", self._listener.address)
        self._turns = _Turns()
        self._is_closed = threading.Event()
        self._clients: set[Pipe] = set()
        threading.Thread(target=self._accept, name="tracekit-server", daemon=True).start()

    @property
    def worker(self) -> Worker | None:
        """What holds the model now."""
        return self._supervisor.worker

    def wait(self, seconds: float | None = None) -> None:
        """Until it is closed, or for so many seconds."""
        end = None if seconds is None else monotonic() + seconds
        while end is None or monotonic() < end:
            if self._is_closed.wait(0.5 if end is None else min(0.5, max(0.0, end - monotonic()))):
                return

    def close(self) -> None:
        """Stop listening, and end the worker."""
        if not self._is_closed.is_set():
            self._is_closed.set()
            with suppress(OSError):  # wake the thread that accepts
                _poke(self.address)
            self._listener.close()
            self._supervisor.close()
            for client in list(self._clients):
                with suppress(OSError):
                    _hang_up(client)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        host, port = self.address[:2]
        return f"<Server on {host}:{port}{', closed' if self._is_closed.is_set() else ''}>"

    # -- its threads ----------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            try:
                client = self._listener.accept()
            except OSError:
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: Pipe) -> None:
        self._clients.add(client)
        with suppress(EOFError, OSError, AuthenticationError), client:
            hurry(client)
            deliver_challenge(client, self._key)
            answer_challenge(client, self._key)
            while not self._is_closed.is_set():
                self._answer(client, receive(client))
        self._clients.discard(client)

    def _answer(self, client: Pipe, message: Message) -> None:
        if message.kind == "stop":  # of a block that has ended
            return
        with self._turns.mine():
            try:
                answer = self._supervisor.exchange(message, partial(_tell, client), client)
            except Exception as error:  # noqa: BLE001 - a client's message must not end the host
                answer = failure(error)
        send(client, answer)


def _tell(client: Pipe, message: Message) -> None:
    with suppress(OSError):
        send(client, message)


def _hang_up(client: Pipe) -> None:
    """End a connection that another thread reads from: that one closes it."""
    with socket.socket(fileno=os.dup(client.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def _poke(address: Address) -> None:
    socket.create_connection(address[:2], 1).close()


@final
class _Turns:
    """One at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def mine(self) -> Generator[None]:
        own = threading.Event()
        with self._lock:
            self._waiting.append(own)
            if self._waiting[0] is own:
                own.set()
        own.wait()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.popleft()
                if self._waiting:
                    self._waiting[0].set()
