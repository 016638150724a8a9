"""A worker holds the model of a host, in a process of its own, and runs program after program."""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, final

import cloudpickle

from tracekit.distributed.executor import Executor
from tracekit.distributed.messages import Message
from tracekit.distributed.wire import receive, send
from tracekit.models.model import Model


def work(connection: Connection[Any, Any], make: Callable[[], Model], shows_prints: bool) -> None:
    """Make the model, say hello, and answer messages until the connection ends.

    This thread runs the programs; another one listens, for a "stop" may come at any time.
    """
    with _sending(connection) as tell:
        try:
            executor = Executor(make())
            tell(executor.hello())
        except Exception as error:  # noqa: BLE001 - the server says it
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            tell(Message("failed", {"text": text}))
            return
        inbox: SimpleQueue[Message | None] = SimpleQueue()
        threading.Thread(target=_listen, args=(connection, inbox, executor), daemon=True).start()
        for message in iter(inbox.get, None):
            with _prints_told(tell) if shows_prints else nullcontext():
                answer = executor.respond(message, tell)
            tell(answer)


@contextmanager
def _sending(connection: Connection[Any, Any]) -> Generator[Callable[[Message], None]]:
    """What sends messages, from a thread of its own; all are sent when this ends.

    An interrupt comes to the thread of the programs at any line, also in the middle of a message:
    the other end would take its rest for the next one.
    """
    outbox: SimpleQueue[Message | None] = SimpleQueue()

    def send_all() -> None:
        with suppress(OSError):  # whoever was to read it is gone
            for message in iter(outbox.get, None):
                send(connection, message)

    sender = threading.Thread(target=send_all, daemon=True)
    sender.start()
    try:
        yield outbox.put
    finally:
        outbox.put(None)
        sender.join()


def _listen(
    connection: Connection[Any, Any], inbox: SimpleQueue[Message | None], executor: Executor
) -> None:
    with suppress(EOFError, OSError):
        while True:
            message = receive(connection)
            if message.kind == "stop":
                executor.stop()
            else:
                inbox.put(message)
    executor.stop()  # whoever sent the program is gone
    inbox.put(None)


@contextmanager
def _prints_told(tell: Callable[[Message], None]) -> Generator[None]:
    """What is printed meanwhile goes to the client."""
    before, sys.stdout = sys.stdout, _Prints(tell)
    try:
        yield
    finally:
        sys.stdout = before


@final
class _Prints(io.TextIOBase):
    """A standard output that sends what it is given."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        super().__init__()
        self._tell = tell

    def write(self, text: str) -> int:
        self._tell(Message("print", {"text": text}))
        return len(text)

    def writable(self) -> bool:
        return True


def main() -> None:
    """Work in a process that a server has started, on the connection that it left open."""
    number = int(sys.argv[1])
    connection: Connection[Any, Any] = Connection(number)
    make: Any = cloudpickle.loads(connection.recv_bytes())
    try:
        work(connection, make, shows_prints=True)
    except (BrokenPipeError, ConnectionResetError):  # the server is gone
        os._exit(0)
