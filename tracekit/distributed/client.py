"""`tracekit.connect(address, key)`: a model that another process serves, as a host for traces."""

from __future__ import annotations

import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Final, final

import torch

from tracekit.capture import showing_own_lines
from tracekit.distributed.host import Heard, ModelHost
from tracekit.distributed.messages import Message
from tracekit.distributed.supervisor import Pipe
from tracekit.distributed.wire import hurry, receive, send
from tracekit.errors import HostError, InputError, LoadingError, TimeLimitError
from tracekit.interleave.protocol import Unwind

_LOOK: Final = 0.2  # seconds between two looks for an interrupt


@showing_own_lines
def connect(
    address: str | tuple[str, int],
    key: str | bytes | Path,
    *,
    device: torch.device | str | None = None,
    timeout: float | None = None,
) -> SocketHost:
    """`host = connect("127.0.0.1:6151", key)`: the model that `tracekit.serve` serves there.

    `key` is server.key, or the path of the file that has it. Tensors come back on the CPU, or on
    `device`; `timeout` is how many seconds a block may take.
    HostError if nobody answers there, or the key is wrong.
    """
    if isinstance(address, str):
        name, _, port = address.rpartition(":")
        if not name or not port.isdigit():
            raise InputError(f"{address!r} is no address: give one like '127.0.0.1:6151'.")
        address = (name, int(port))
    told = key.read_text("utf-8").strip() if isinstance(key, Path) else key
    found = told.encode() if isinstance(told, str) else told
    if not found:
        raise InputError("the key is empty: give the one that the server printed, or server.key.")
    host = SocketHost(_Line(address, found), device, timeout)
    host._hello()  # pyright: ignore[reportPrivateUsage] - same file
    return host


@final
class _Line:
    """The connection to one server, which is made again when it was lost."""

    def __init__(self, address: tuple[str, int], key: bytes) -> None:
        self.address = address
        self._key = key
        self._pipe: Pipe | None = None
        self.lock = threading.Lock()  # one message at a time
        self.hello: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The address, for people."""
        return f"{self.address[0]}:{self.address[1]}"

    def open(self) -> Pipe:
        """The connection; HostError if there can be none."""
        if self._pipe is None:
            try:
                self._pipe = Client(self.address, "AF_INET", authkey=self._key)
                hurry(self._pipe)
            except AuthenticationError:
                raise HostError(
                    f"the host at {self.name} refused the key: give the one that its server has "
                    f"(server.key, or the file that `tracekit serve` names)."
                ) from None
            except (OSError, EOFError) as error:
                raise HostError(
                    f"no host answers at {self.name} ({error}): start one with "
                    f"tracekit.serve(...), or `tracekit serve MODEL`."
                ) from None
        return self._pipe

    def drop(self) -> None:
        """Close it; the next message goes over a new one."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


@final
class SocketHost(ModelHost):
    """A model that a server serves; `connect` makes it."""

    def __init__(
        self, line: _Line, device: torch.device | str | None, timeout: float | None
    ) -> None:
        super().__init__(device, timeout)
        self._line = line

    def close(self) -> None:
        """End the connection; the server goes on."""
        self._line.drop()

    def _hello(self) -> dict[str, Any]:
        if self._line.hello is None:
            self._line.hello = dict(self._exchange(Message("hello"), None).head)
        return self._line.hello

    def _exchange(self, message: Message, hear: Heard | None) -> Message:
        with self._line.lock:
            pipe = self._line.open()
            try:
                send(pipe, message)
                return _unfailed(self._answer(pipe, hear))
            except (HostError, LoadingError, TimeLimitError):
                raise
            except (EOFError, OSError) as error:
                self._line.drop()
                raise HostError(
                    f"the host at {self._line.name} has gone "
                    f"({error or 'it ended the connection'}): what the block had bound is lost."
                ) from None
            except BaseException:  # in the middle of a message
                self._line.drop()
                raise

    def _answer(self, pipe: Pipe, hear: Heard | None) -> Message:
        was_stopped = False
        heard: list[Message] = []
        while True:
            try:
                if heard and hear is not None:
                    hear(heard.pop())
                while not pipe.poll(_LOOK):
                    pass
            except KeyboardInterrupt:
                if was_stopped:  # pressed again: leave it alone there
                    raise
                was_stopped = True
                send(pipe, Message("stop"))
                continue
            except Unwind:  # nobody wants more of a stream
                hear = None
                send(pipe, Message("stop"))
                continue
            message = receive(pipe)
            if message.kind not in ("print", "item"):
                return message
            heard = [message]

    def __repr__(self) -> str:
        return f"<SocketHost at {self._line.name}>"


_ERRORS: Final = {"host": HostError, "loading": LoadingError, "time": TimeLimitError}


def _unfailed(message: Message) -> Message:
    """The answer; the error of the host itself, if there is one."""
    if message.kind == "failure":
        raise _ERRORS[message.head["kind"]](message.head["text"])
    return message
