"""Messages over a connection of multiprocessing, in pieces; nothing on it is unpickled unread."""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from typing import Any, Final

from tracekit.distributed.messages import Message, read_header

PIECE: Final = 1 << 24  # bytes; what is copied at a time beside a message that comes or goes
_LONGEST_HEADER: Final = 1 << 28


def hurry(connection: Connection[Any, Any]) -> None:
    """Let small pieces go at once: TCP would hold them back until the last one was confirmed."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send(connection: Connection[Any, Any], message: Message) -> None:
    """Send a message; of its buffers nothing is copied."""
    connection.send_bytes(message.header())
    for buffer in message.buffers:
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), PIECE):
            connection.send_bytes(view[start : start + PIECE])


def receive(connection: Connection[Any, Any]) -> Message:
    """The next message; EOFError if there is none to come."""
    kind, head, sizes = read_header(connection.recv_bytes(_LONGEST_HEADER))
    return Message(kind, head, [_buffer(connection, size) for size in sizes])


def _buffer(connection: Connection[Any, Any], size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    start = 0
    while start < size:
        start += connection.recv_bytes_into(view[start : start + PIECE])
    return data
