"""How blocks are run: switches for tests and for debugging, and sizes; they change no number."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, final

from tracekit.errors import SettingError, did_you_mean


@final
class Settings:
    """The settings of the process: assign to one, or change some for the length of a `with`."""

    __slots__ = ("defer_reads", "lift_blocks", "offload_bytes")

    lift_blocks: bool
    """Whether a block is lifted onto a worker where that is possible; else it stays in place."""

    defer_reads: bool
    """Whether reads that a block only stores are filled by hooks, with no hand-over."""

    offload_bytes: int
    """How much pinned memory of the host, in bytes for each accelerator, a cache may use to move
    values off it while the model goes on, and as much on the accelerator; 0: the model waits for
    each value."""

    def __init__(self) -> None:
        self.lift_blocks = True
        self.defer_reads = True
        self.offload_bytes = 256 * 2**20

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__slots__:
            raise _unknown(name)
        if name == "offload_bytes":
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SettingError(f"settings.{name} is a number of bytes, or 0, not {value!r}.")
        elif not isinstance(value, bool):
            raise SettingError(f"settings.{name} is True or False, not {value!r}.")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> object:  # called for what there is not
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)

    @contextmanager
    def changed(self, **values: bool | int) -> Generator[None]:
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
