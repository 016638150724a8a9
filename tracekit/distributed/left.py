"""What stands for a value that stayed on the host, as it can't be sent: whoever uses it is told."""

from __future__ import annotations

from typing import Any, NoReturn, final

from tracekit.errors import RemoteError


@final
class Left:
    """A name that the block bound to what can't be sent; any use of it is a RemoteError."""

    def __init__(self, name: str, why: str) -> None:
        self.__dict__["_told"] = (
            f"{name} stayed on the host, as it can't be sent: {why}. Bind what you need of it in "
            f"the block."
        )

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RemoteError(self.__dict__["_told"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of Python's own protocols, which ask what there is
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return f"<{self.__dict__['_told']}>"

    __call__ = __iter__ = __len__ = __getitem__ = __bool__ = __enter__ = __add__ = _refuse

    def __exit__(self, *_: object) -> None:
        """Never reached: `__enter__` raises."""
