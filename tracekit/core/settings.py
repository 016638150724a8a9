"""How blocks are run: switches for tests and for debugging, which change no number."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from tracekit.errors import SettingError, did_you_mean


@final
class Settings:
    """The switches of the process: assign to one, or change some for the length of a `with`."""

    __slots__ = ("defer_reads", "lift_blocks")

    lift_blocks: bool
    """Whether a block is lifted onto a worker where that is possible; else it stays in place."""

    defer_reads: bool
    """Whether reads that a block only stores are filled by hooks, with no hand-over."""

    def __init__(self) -> None:
        self.lift_blocks = True
        self.defer_reads = True

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__slots__:
            raise _unknown(name)
        if not isinstance(value, bool):
            raise SettingError(f"settings.{name} is True or False, not {value!r}.")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> object:  # called for what there is not
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)

    @contextmanager
    def changed(self, **values: bool) -> Generator[None]:
        """Set `values` for the length of `with settings.changed(lift_blocks=False):`."""
        before = {name: getattr(self, name) for name in values}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def __repr__(self) -> str:
        return f"settings({', '.join(f'{name}={getattr(self, name)}' for name in self.__slots__)})"


def _unknown(name: str) -> SettingError:
    return SettingError(
        f"{name!r} is not a setting{did_you_mean(name, Settings.__slots__)} "
        f"(there: {', '.join(Settings.__slots__)})."
    )


settings: Final = Settings()
