"""Blocks of one trace that run in turns: each sees its own names, then those of its siblings."""

# Guarantees:
#   - a name means to a block what it would mean if the blocks ran one behind the other: what the
#     block bound itself, else what the nearest block before it bound, else what it was where the
#     block stands (a loop's variable: in that round of the loop);
#   - so one block's `h` is never another's, though both stand in one function;
#   - afterwards names are bound as if the last block had come last, and nothing is held.
#
# The blocks share the frame's names, and only one block runs at a time. So before each turn of a
# block its view of the names is put in place, and behind it what it bound is taken out.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FrameType
from typing import Any, Final, Protocol, TypeAlias, final

from tracekit.capture.variables import bind, forget_snapshot

UNBOUND: Final = object()
# Sleep until the function given says so; the text says what for.
Sleep: TypeAlias = Callable[[Callable[[], bool], str], None]


class Spot(Protocol):
    """Where the value of a name lives."""

    @property
    def is_private(self) -> bool:
        """Whether one block alone has it."""
        ...

    def get(self) -> object: ...
    def set(self, value: object) -> None: ...


@final
@dataclass(frozen=True)
class CellSpot:
    """A variable of a function, in its cell."""

    cell: CellType
    is_private: bool

    def get(self) -> object:
        try:
            return self.cell.cell_contents
        except ValueError:
            return UNBOUND

    def set(self, value: object) -> None:
        if value is not UNBOUND:
            self.cell.cell_contents = value
        elif self.get() is not UNBOUND:
            del self.cell.cell_contents


@final
@dataclass(frozen=True)
class ItemSpot:
    """A name of a module, or of another namespace."""

    namespace: dict[str, Any]
    name: str
    is_private = False

    def get(self) -> object:
        return self.namespace.get(self.name, UNBOUND)

    def set(self, value: object) -> None:
        if value is UNBOUND:
            self.namespace.pop(self.name, None)
        else:
            self.namespace[self.name] = value


@final
class Member:
    """One block among its siblings."""

    def __init__(
        self,
        run: Callable[[], object],
        frame: FrameType,
        spots: Mapping[str, Spot],
        writes: frozenset[str],
        line: int,
    ) -> None:
        self._run: Callable[[], object] | None = run
        self.frame: FrameType | None = frame
        self.spots: Mapping[str, Spot] = spots
        self.writes = writes
        self.line = line
        self.own: dict[str, object] = {}  # what the block bound, or unbound
        self.has_ended = False
        self._taken = {name: spot.get() for name, spot in spots.items()}
        self._in_place: dict[str, object] = {}
        self._family: Family | None = None
        self._index = 0

    def join(self, family: Family, index: int) -> None:
        """Run beside the others of `family`."""
        self._family = family
        self._index = index

    def __call__(self) -> None:
        """Run the statements of the block, in turns."""
        run, self._run = self._run, None
        try:
            assert run is not None
            run()
        finally:
            self.has_ended = True

    def enter(self) -> None:
        """A turn of the block begins."""
        for name, spot in self.spots.items():
            seen = self._view(name)
            self._in_place[name] = seen
            if spot.get() is not seen:
                spot.set(seen)

    def leave(self) -> None:
        """The turn is over."""
        for name, spot in self.spots.items():
            value = spot.get()
            if value is not self._in_place[name]:
                self.own[name] = value
                if self._family is not None:
                    self._family.written.add(name)
        self._in_place.clear()

    def wait_for(self, name: str, sleep: Sleep) -> None:
        """Sleep until the block before this one that binds `name` has bound it."""
        while name in self._in_place and name not in self.own:
            if self.spots[name].get() is not self._in_place[name]:
                return  # bound in this turn
            binder = self._binder(name)
            if binder is None:
                return
            sleep(
                lambda binder=binder: name in binder.own or binder.has_ended,
                f"{name!r}, which the block at line {binder.line} binds",
            )

    def let_go(self) -> None:
        """Hold nothing: functions made in the block may outlive it, and refer to it."""
        self._run, self.frame, self._family = None, None, None
        self.spots, self.own, self._taken, self._in_place = {}, {}, {}, {}

    def _binder(self, name: str) -> Member | None:
        """The sibling that is still to bind `name` for this block."""
        for sibling in self._before(name):
            if name in sibling.own:
                return None
            if name in sibling.writes and not sibling.has_ended:
                return sibling
        if self._view(name) is not UNBOUND:
            return None
        behind = (each for each in self._behind(name) if name in each.writes)
        return next((each for each in behind if not each.has_ended), None)

    def _view(self, name: str) -> object:
        if name in self.own:
            return self.own[name]
        for sibling in self._before(name):
            if name in sibling.own:
                return sibling.own[name]
        for sibling in self._behind(name):
            if name in sibling.own:
                return sibling.own[name]
        return self._taken[name]

    def _before(self, name: str) -> Iterator[Member]:
        """The blocks of the same frame that know the name and stand before, nearest first."""
        return self._relatives(range(self._index - 1, -1, -1), name)

    def _behind(self, name: str) -> Iterator[Member]:
        assert self._family is not None
        return self._relatives(range(self._index + 1, len(self._family.members)), name)

    def _relatives(self, indices: range, name: str) -> Iterator[Member]:
        assert self._family is not None
        if name not in self._family.written:
            return
        for index in indices:
            member = self._family.members[index]
            if member.frame is self.frame and name in member.spots:
                yield member


@final
class Family:
    """The blocks of one trace, in the order in which they stand."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.written: set[str] = set()  # names that any of them binds
        self._before: list[tuple[Spot, object]] = []

    def add(self, member: Member) -> None:
        """One more block, behind the others."""
        member.join(self, len(self.members))
        self.members.append(member)
        self.written |= member.writes

    def begin(self) -> None:
        """Note what the names are that others can see, before the first turn."""
        self._before = [
            (spot, spot.get())
            for member in self.members
            for spot in member.spots.values()
            if not spot.is_private
        ]

    def hand_back(self) -> None:
        """Bind in the frames what the blocks bound, the last one's last; used once."""
        members, self.members = self.members, []
        before, self._before = self._before, []
        for spot, value in before:
            spot.set(value)
        private: dict[int, tuple[FrameType, dict[str, object]]] = {}
        for member in members:
            assert member.frame is not None
            _, bound = private.setdefault(id(member.frame), (member.frame, {}))
            for name, value in member.own.items():
                if member.spots[name].is_private:
                    bound[name] = value
                else:
                    member.spots[name].set(value)
        try:
            for frame, bound in private.values():
                removed = [name for name, value in bound.items() if value is UNBOUND]
                bind(frame, {name: bound[name] for name in bound if name not in removed}, removed)
                forget_snapshot(frame)
        finally:
            for member in members:
                member.let_go()
