"""What client and host say to each other: a head of plain data, and buffers beside it."""

# Nothing here is unpickled before the head was read: it is JSON, and says which version wrote it.

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from tracekit.errors import HostError

FORMAT: Final = 1  # of programs and what comes back; it changes whenever one side may not know it


@final
@dataclass(frozen=True)
class Message:
    """`kind` and `head` are data for any Python; `buffers` are bytes-like, an index first."""

    kind: str
    head: Mapping[str, Any] = field(default_factory=dict[str, Any])
    buffers: list[Any] = field(default_factory=list[Any])

    @property
    def size(self) -> int:
        """Bytes of it all."""
        return len(self.header()) + sum(map(_size, self.buffers))

    def header(self) -> bytes:
        """The kind, the head, and how long each buffer is."""
        told = {"format": FORMAT, "kind": self.kind, "head": dict(self.head)}
        return json.dumps({**told, "sizes": [_size(each) for each in self.buffers]}).encode()

    def copied(self) -> Message:
        """The same, as another process would have it: every byte copied."""
        kind, head, _ = read_header(self.header())
        return Message(kind, head, [bytearray(each) for each in self.buffers])


def _size(buffer: Any) -> int:
    return memoryview(buffer).nbytes


def read_header(data: bytes) -> tuple[str, dict[str, Any], list[int]]:
    """Kind, head and sizes; HostError if another version of tracekit wrote it."""
    found = json.loads(data)
    if found.get("format") != FORMAT:
        raise HostError(
            f"the other side speaks format {found.get('format')}, and this tracekit format "
            f"{FORMAT}: install the same version of tracekit on both sides."
        )
    return found["kind"], found["head"], found["sizes"]
