"""Writing beside the model: one thing at a time, so that no forward waits for the disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import final


@final
class Writer:
    """Writes on a thread of its own; what `put` was given last may still be under way.

    When its `with` ends, all is written. An error of the disk is raised by the next `put`, or then.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "tracekit-harvest")
        self._under_way: tuple[Future[None], Callable[[], None]] | None = None

    def put(self, write: Callable[[], None], written: Callable[[], None]) -> None:
        """Wait for what was put before, and begin with this; `written` is called, here, later."""
        self._wait()
        self._under_way = self._pool.submit(write), written

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            future, written = under_way
            future.result()
            written()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown()  # waits: what was begun is written, also after Ctrl-C
