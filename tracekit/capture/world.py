"""What a forecast knows: the names of a block's frame, and what the user's objects do."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Protocol, final

from tracekit.capture.variables import forget_snapshot

SCALARS: Final = (int, str, float, bool, type(None), bytes, complex, type(...))


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
@dataclass(slots=True)
class Taken:
    """What the block will get from the model, or has made of that: to be stored, and no more."""

    value: object
    is_whole: bool = True  # as the model gave it; else `value` means nothing


@final
class Scope:
    """The names of a block's frame as they are now, and those that the block has bound since.

    What a forecast sees, the block sees again when it runs, behind the model. The model, or a hook
    of the user's, may have changed it by then: so it is remembered here, and compared.
    """

    def __init__(
        self, frame: FrameType, world: World, taken: Mapping[str, object] | None = None
    ) -> None:
        self.own: dict[str, object] = {}
        self.world = world
        self._taken: Mapping[str, object] = taken or {}  # names that mean another thing to it
        self._frame: FrameType | None = frame
        self._outer = _names_around(frame)
        self._changed: dict[int, object] = {}  # containers that the block has stored into, by id
        self._looping: set[int] = set()  # containers that a loop goes through, by id
        self._named: dict[str, object] = {}  # what names meant
        self._seen: list[tuple[object, Callable[[], object], object]] = []  # in what, how, what

    def value(self, name: str) -> object:
        """What a name means."""
        if name in self.own:
            return self.own[name]
        if name in self._taken:
            return self._taken[name]
        for names in self._outer:
            if name in names:
                found = names[name]
                if self._named.setdefault(name, found) is not found:
                    raise Unsure
                return found
        raise Unsure

    def note_change(self, container: object) -> None:
        """The block stores into `container`: from here on its contents are not known."""
        if id(container) in self._looping:
            raise Unsure
        self._changed[id(container)] = container

    def known(self, container: object) -> Any:
        """`container`, if it still holds what the block will see in it."""
        if id(container) in self._changed:
            raise Unsure
        return container

    def saw(self, container: object, look: Callable[[], Any]) -> Any:
        """`look()`, which depends on what `container` holds and has no effect."""
        self.known(container)
        found = look()
        self._seen.append((container, look, found))
        return found

    @contextmanager
    def looping(self, evaluate: Callable[[], Iterable[Any]]) -> Generator[Iterable[Any]]:
        """What a loop goes through: the block may not change that meanwhile."""
        first = len(self._seen)
        found = evaluate()
        gone_through = {id(container) for container, _, _ in self._seen[first:]} - self._looping
        self._looping |= gone_through
        try:
            yield found
        finally:
            self._looping -= gone_through

    @property
    def changed(self) -> set[int]:
        """The containers that the block stores into, by id."""
        return set(self._changed)

    @property
    def looked_into(self) -> set[int]:
        """The containers whose contents decide something in the block, by id."""
        return {id(container) for container, _, _ in self._seen}

    def is_as_it_was(self) -> bool:
        """Whether the block will see all that the forecast saw; to be asked once, at the end."""
        frame, self._frame = self._frame, None
        assert frame is not None
        around = _names_around(frame) if self._named else ()
        for name, value in self._named.items():
            names = next((names for names in around if name in names), None)
            if names is None or names[name] is not value:
                return False
        try:
            return all(_is_same(look(), found) for _, look, found in self._seen)
        except Exception:  # noqa: BLE001 - an index that is gone, a key …
            return False


def _names_around(frame: FrameType) -> tuple[Mapping[str, object], ...]:
    own = frame.f_locals
    names = (own if own is frame.f_globals else dict(own), frame.f_globals, frame.f_builtins)
    del own
    forget_snapshot(frame)
    return names


def _is_same(one: Any, other: Any) -> bool:
    if type(one) in (list, tuple) and type(other) is type(one) and len(one) == len(other):
        return all(_is_same(first, second) for first, second in zip(one, other, strict=True))
    return one is other or (type(one) is type(other) and type(one) in SCALARS and one == other)
