"""What a forecast knows: the names of a block's frame, and what the user's objects do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, final

from tracekit.capture.variables import forget_snapshot


class Unsure(Exception):
    """What comes next in the block is not known without running it."""


class World(Protocol):
    """What is known of the user's objects, beyond Python's own."""

    def attribute(self, of: object, name: str) -> object:
        """An attribute, if reading it has no effect; else Unsure."""
        ...

    def item(self, of: object, index: object) -> object:
        """`of[index]`, if that has no effect; else Unsure."""
        ...

    def elements(self, of: object) -> Iterable[object]:
        """What a loop over `of` goes through, if it is known; else Unsure."""
        ...


@final
@dataclass(frozen=True)
class Taken:
    """What the block will get from the model, or has made of that: to be stored, and no more."""

    value: object
    is_whole: bool = True  # as the model gave it; else `value` means nothing


@final
class Scope:
    """The names of a block's frame as they are now, and those that the block has bound since."""

    def __init__(
        self, frame: FrameType, world: World, taken: Mapping[str, object] | None = None
    ) -> None:
        self.own: dict[str, object] = {}
        self.world = world
        self._outer: tuple[Mapping[str, object], ...] = (
            taken or {},  # names that mean something else to the block
            frame.f_globals if frame.f_locals is frame.f_globals else dict(frame.f_locals),
            frame.f_globals,
            frame.f_builtins,
        )
        forget_snapshot(frame)
        self._changed: dict[int, object] = {}  # containers that the block has stored into, by id

    def value(self, name: str) -> object:
        """What a name means."""
        if name in self.own:
            return self.own[name]
        for names in self._outer:
            if name in names:
                return names[name]
        raise Unsure

    def note_change(self, container: object) -> None:
        """The block stores into `container`: from here on its contents are not known."""
        self._changed[id(container)] = container

    def known(self, container: object) -> Any:
        """`container`, if it still holds what the block will see in it."""
        if id(container) in self._changed:
            raise Unsure
        return container
