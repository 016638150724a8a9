"""Blocks of one trace that run in turns: each sees its own names, then those of its siblings."""

# Guarantees:
#   - a name means to a block what it would mean if the blocks ran one behind the other: what the
#     block bound itself, else what the nearest block before it bound, else what it was where the
#     block stands (a loop's variable: in that round of the loop); what a block behind it bound it
#     sees once both have met at a barrier, if those leave the name open;
#   - so one block's `h` is never another's, though both stand in one function;
#   - what a block before it is still to bind is unbound for a block: it waits where it reads the
#     name itself, and functions that it calls fail, where they would find an old value;
#   - afterwards names are bound as if the last block had come last, and nothing is held.
#
# The blocks share variables: those of one frame, and cells and globals that functions share. Only
# one block runs at a time. So before each turn of a block its view of the variables is put in
# place, and behind it what it bound is taken out.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FrameType
from typing import Any, Final, Protocol, TypeAlias, final

from tracekit.capture.variables import bind, forget_snapshot
from tracekit.errors import LaterBlockError

UNBOUND: Final = object()
Key: TypeAlias = "tuple[int, str]"  # one variable, by whatever frame it is reached
# Sleep until the function given says so; the text says what for.
Sleep: TypeAlias = Callable[[Callable[[], bool], str], None]


class Spot(Protocol):
    """Where the value of a name lives."""

    @property
    def key(self) -> Key:
        """The same for each spot of one variable."""
        ...

    @property
    def is_private(self) -> bool:
        """Whether one block alone has it."""
        ...

    def get(self) -> object: ...
    def set(self, value: object) -> None: ...


@final
@dataclass(slots=True, eq=False)
class CellSpot:
    """A variable of a function, in its cell, or in a copy of its own if `is_private`."""

    cell: CellType
    name: str
    frame: FrameType
    is_private: bool

    @property
    def key(self) -> Key:
        return id(self.frame if self.is_private else self.cell), self.name

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
@dataclass(slots=True, eq=False)
class ItemSpot:
    """A name of a module, or of another namespace."""

    namespace: dict[str, Any]
    name: str
    is_private = False

    @property
    def key(self) -> Key:
        return id(self.namespace), self.name

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
        self.line = line
        self.keys = {name: spot.key for name, spot in spots.items()}
        self.spots: dict[Key, Spot] = {self.keys[name]: spot for name, spot in spots.items()}
        self.writes = frozenset(self.keys[name] for name in writes)
        self.own: dict[Key, object] = {}  # what the block bound, or unbound
        self.has_ended = False
        self.taken = {key: spot.get() for key, spot in self.spots.items()}
        self._met: dict[Key, object] = {}  # what blocks behind it had bound at its last barrier
        self._in_place: dict[Key, object] = {}
        self._pending: list[Key] = []  # unbound in this turn, as a block before is to bind them
        self._family: Family | None = None
        self._index = 0

    @property
    def names_taken(self) -> dict[str, object]:
        """What the names were where the block stands."""
        values = {name: self.taken[key] for name, key in self.keys.items()}
        return {name: value for name, value in values.items() if value is not UNBOUND}

    def join(self, family: Family, index: int) -> None:
        """Run beside the others of `family`."""
        self._family = family
        self._index = index

    def learn_of(self, other: Member) -> None:
        """See what `other` binds as it should be, also in functions that the block calls."""
        for key in other.writes - self.spots.keys():
            spot = other.spots[key]
            if not spot.is_private and (other.frame is self.frame or isinstance(spot, ItemSpot)):
                self.spots[key] = spot
                self.keys.setdefault(key[1], key)
                self.taken[key] = other.taken[key] if self._index < other._index else spot.get()

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
        for key, spot in self.spots.items():
            seen = self._view(key)
            if isinstance(seen, Member):
                self._pending.append(key)
                seen = UNBOUND
            self._in_place[key] = seen
            if spot.get() is not seen:
                spot.set(seen)

    def leave(self) -> None:
        """The turn is over."""
        for key, spot in self.spots.items():
            value = spot.get()
            if value is not self._in_place[key]:
                self.own[key] = value
                if self._family is not None:
                    self._family.written.add(key)
        for key in self._pending:  # what runs between turns knows nothing of the blocks
            if key not in self.own:
                self.spots[key].set(self.taken[key])
        self._in_place.clear()
        self._pending.clear()

    def meet(self) -> None:
        """Within a turn: see also what blocks behind this one have bound by now."""
        self.leave()
        for key in self.spots:
            bound = (each.own[key] for each in self._behind(key) if key in each.own)
            self._met[key] = next(bound, self._met.get(key, UNBOUND))
        self.enter()

    def wait_for(self, name: str, sleep: Sleep) -> None:
        """Sleep until the block before this one that binds `name` has bound it."""
        key = self.keys.get(name)
        while key is not None and key in self._in_place and key not in self.own:
            if self.spots[key].get() is not self._in_place[key]:
                return  # bound in this turn
            view = self._view(key)
            if view is UNBOUND:
                self._refuse_later(name, key)
            if not isinstance(view, Member):
                return
            sleep(
                lambda binder=view, key=key: key in binder.own or binder.has_ended,
                f"{name!r}, which the block at line {view.line} binds",
            )

    def let_go(self) -> None:
        """Hold nothing: functions made in the block may outlive it, and refer to it."""
        self._run, self.frame, self._family = None, None, None
        self.spots, self.own, self.taken, self._met, self._in_place = {}, {}, {}, {}, {}

    def _view(self, key: Key) -> object:
        """What the block sees of a variable: its value, or the block that is still to bind it."""
        if key in self.own:
            return self.own[key]
        for sibling in self._before(key):
            if key in sibling.own:
                return sibling.own[key]
            if key in sibling.writes and not sibling.has_ended:
                return sibling
        met = self._met.get(key, UNBOUND)
        return self.taken[key] if met is UNBOUND else met

    def _refuse_later(self, name: str, key: Key) -> None:
        later = next((each for each in self._behind(key) if key in each.writes), None)
        if later is not None:
            raise LaterBlockError(
                f"{name!r} is bound by the block at line {later.line}, which stands after this "
                f"one: put that block first, or let both call a barrier where it is bound "
                f"(barrier = tracer.barrier(2))."
            )

    def _before(self, key: Key) -> Iterator[Member]:
        """The blocks that know the variable and stand before, nearest first."""
        return self._relatives(range(self._index - 1, -1, -1), key)

    def _behind(self, key: Key) -> Iterator[Member]:
        assert self._family is not None
        return self._relatives(range(self._index + 1, len(self._family.members)), key)

    def _relatives(self, indices: range, key: Key) -> Iterator[Member]:
        assert self._family is not None
        if key not in self._family.written:
            return
        for index in indices:
            member = self._family.members[index]
            if key in member.spots:
                yield member


@final
class Family:
    """The blocks of one trace, in the order in which they stand."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.written: set[Key] = set()  # variables that any of them binds
        self._before: list[tuple[Spot, object]] = []

    def add(self, member: Member) -> None:
        """One more block, behind the others."""
        member.join(self, len(self.members))
        for other in self.members:
            if not other.writes <= member.spots.keys():
                member.learn_of(other)
            if not member.writes <= other.spots.keys():
                other.learn_of(member)
        self.members.append(member)
        self.written |= member.writes

    def begin(self) -> None:
        """Note what the variables are that others can see, before the first turn."""
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
            for key, value in member.own.items():
                if member.spots[key].is_private:
                    bound[key[1]] = value
                else:
                    member.spots[key].set(value)
        try:
            for frame, bound in private.values():
                removed = [name for name, value in bound.items() if value is UNBOUND]
                bind(frame, {name: bound[name] for name in bound if name not in removed}, removed)
                forget_snapshot(frame)
        finally:
            for member in members:
                member.let_go()
