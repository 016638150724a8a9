"""A generation on a host, gone through step by step here: both ends of what comes on the way."""

# The host does not wait for the loop: items come as they are made, and wait in the connection. So
# what the host recorded is complete, and sent, at the end alone. Leaving the loop stops the host.

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final, cast, final

from tracekit.distributed.messages import Message
from tracekit.distributed.parcel import Directory, Packer, Parcel, Unpacker
from tracekit.errors import StreamError
from tracekit.models.streaming import Gains, Stream
from tracekit.models.texts import Texts
from tracekit.tracing.elsewhere import Done
from tracekit.tracing.relay import Relay

METHOD: Final = "generate_stream"
_GAINS: Final = {"cache": "cache", "result": "result", "value": "returned"}
_NO_CACHE: Final = (
    "the cache of a stream from a host comes with the end of the stream: read stream.cache behind "
    "the loop."
)

Heard = Callable[[Message], None]


# -- on the host ----------------------------------------------------------------------------------


def emit_items(stream: Stream, directory: Directory, emit: Heard) -> None:
    """Emit each item of a stream, which has ended then, whatever happens."""
    try:
        for item in stream:
            packer = Packer(directory)
            packer.add("item", item)
            emit(Message("item", {}, [packer.parcel.index(), *packer.parcel.buffers]))
    finally:
        stream.close()


def gains_of(stream: Stream) -> dict[str, Any]:
    """What a stream that has ended, or was left, has besides its items."""
    found: dict[str, Any] = {}
    for name, key in _GAINS.items():
        with suppress(StreamError):
            found[key] = getattr(stream, name)
    return found


# -- on the client --------------------------------------------------------------------------------


@final
class Openness:
    """Whether a stream of a host stands still here; nothing else can be asked of the host then."""

    def __init__(self) -> None:
        self._is_open = False

    def check(self) -> None:
        """StreamError while a stream is gone through."""
        if self._is_open:
            raise StreamError(
                "the host is at work on a stream, which is not at its end: go through it or leave "
                "its loop first, or use another host (connect(...) again is one)."
            )

    @contextmanager
    def opened(self) -> Generator[None]:
        """While a stream is gone through."""
        self.check()
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False


def stream_from(
    carry_out: Callable[[Heard], Done], directory: Directory, openness: Openness
) -> Stream:
    """The Stream of items that `carry_out`, called at the first one, hears of."""
    gains = Gains(not_yet=_NO_CACHE)
    run = partial(_run, carry_out, directory, openness, gains)
    return Stream(Relay(run), gains, cast("Texts", _AsSent()))


def _run(
    carry_out: Callable[[Heard], Done],
    directory: Directory,
    openness: Openness,
    gains: Gains,
    relay: Relay,
) -> None:
    with openness.opened():
        done = carry_out(partial(_hear, directory, relay))
    found = done.names
    gains.cache = cast("Any", found.get("cache"))
    gains.result = found.get("result", gains.result)
    gains.value = found.get("returned", gains.value)
    if done.error is None or (relay.was_left and not isinstance(done.error, Exception)):
        return  # a loop that was left has interrupted the host
    raise done.error


def _hear(directory: Directory, relay: Relay, message: Message) -> None:
    parcel = Parcel.of(bytes(message.buffers[0]), list(message.buffers[1:]))
    relay.hand_over(Unpacker(parcel, directory).value("item"))


@final
class _AsSent:
    """In the place of Texts: the host has made the texts."""

    def add(self, item: Any) -> Any:
        """The item."""
        return item

    def end(self) -> None:
        """Nothing is held back here."""
