"""A Session is several traces that share values, and that can be ended from anywhere in it."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn, final

from tracekit.errors import OutsideTraceError


class SessionOver(BaseException):
    """Leave the session now; `except Exception` in its block does not hold it up."""

    def __init__(self, session: Session) -> None:
        super().__init__("the session was stopped")
        self.session = session


@final
class Session:
    """What `with model.session() as session:` binds.

    Its block is plain Python, run where it stands: what a trace binds is there for the next one.
    """

    def __init__(self) -> None:
        self._is_open = False

    def stop(self) -> NoReturn:
        """Leave the session, and the trace in it that this may be called in."""
        if not self._is_open:
            raise OutsideTraceError("session.stop() belongs into the block of its session.")
        raise SessionOver(self)

    def __enter__(self) -> Session:
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # To a type checker, as to a reader, this `with` swallows nothing.
        self._is_open = False
        if isinstance(error, SessionOver) and error.session is self:
            return True  # pyright: ignore[reportReturnType] - what follows stop() is left out
        return None
