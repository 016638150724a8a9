"""Stored reads of whole blocks, filled by hooks alone: no request is made, and nobody waits."""

# Of some blocks all is known that they will ask. They need nothing of the interleaver, if the model
# serves them in that order; whether it does shows in a run with requests (ahead.py). So the first
# run makes them, and what went well is remembered with the model. From then on the hooks of the
# blocks' own modules do what the interleaver would:
#   - a value is taken where the block would be waiting for it, of the first call in the first step;
#   - where what it asks for next has passed, the run ends, with the error that says so.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Final, NamedTuple, final

from torch import Tensor, nn

from tracekit.core.nest import map_leaves, tensors
from tracekit.core.origins import note_visit
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import UNKNOWN, Versions, version
from tracekit.errors import TracekitError
from tracekit.interleave import unserved
from tracekit.interleave.answers import Answers
from tracekit.interleave.duties import Rows
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import Reply, Unwind

_KEPT: Final = 512  # blocks that are remembered with a model
_NO_THREAD: Final = -1


@final
@dataclass(slots=True)
class Look:
    """One value that a block will ask for; it stands for the value as long as that is not there."""

    visit: Visit
    line: Line
    part: Callable[[Any], Any] | None  # all that the block uses of it; by default, the whole
    depth: int = 0  # where in it the block keeps something; 0 is the value itself

    def shown(self, value: Any) -> Any:
        """What the block is to get: what it takes out of that later is what it would take now."""
        value = value if self.part is None else self.part(value)
        try:
            return _settled(value, self.depth) if self.depth else value
        except Exception:  # noqa: BLE001 - of a kind that can't be copied; the model goes on
            return value


class Asked(NamedTuple):
    """What a block will ask, and whether it will see all that this was said from."""

    looks: Sequence[Look]
    is_as_it_was: Callable[[], bool]  # asked once, behind the run


@dataclass(slots=True)
class _Place:
    """The first call of one module, before or behind it."""

    onlookers: list[_Onlooker]
    running: int = 0
    has_passed: bool = False


@final
class _Onlooker:
    """One block: what it will ask, and how much of that the model has come to."""

    def __init__(self, asked: Asked, rows: Rows | None, kind: object) -> None:
        self._asked = asked
        self._places: list[_Place | None] = []  # for each look; None is the result of the call
        self._come = 0  # looks that the model has come to
        self.rows = rows
        self.key = kind, type(rows), tuple([look.visit for look in asked.looks])
        self.look = asked.looks[0] if asked.looks else None  # what it asks next
        self.awaited: _Place | None = None
        self.error: BaseException | None = None  # what there is in the place of the next value
        self.mediator: Mediator | None = None
        self.answers = Answers(0, is_all=True)

    def expect(self, mediator: Mediator, place_of: Callable[[Site], _Place | None]) -> None:
        """Before the run: know the places."""
        self.mediator = mediator
        for look in self._asked.looks:
            place = place_of(look.visit.site)
            if place is not None and self not in place.onlookers:
                place.onlookers.append(self)
            self._places.append(place)
        self.awaited = self._places[0] if self._places else None

    @property
    def last(self) -> tuple[Visit, Line] | None:
        """What it got last, and the line that asked."""
        before = self._asked.looks[self._come - 1] if self._come else None
        return None if before is None else (before.visit, before.line)

    def go_on(self) -> None:
        """It has got what it asked."""
        self._come += 1
        is_over = self._come == len(self._places)
        self.look = None if is_over else self._asked.looks[self._come]
        self.awaited = None if is_over else self._places[self._come]

    def hand_over(self) -> None:
        """After the run: let the block find its answers."""
        assert self.mediator is not None
        if self.look is not None:
            error = self.error or Unwind(self.mediator)
            self.answers.put(self.look.visit, Reply(error=error))
        self.answers.is_as_it_was = self._asked.is_as_it_was
        self.answers.look_again()
        self.mediator.remember(self.answers)

    def close(self) -> None:
        self._places.clear()
        self.mediator = self.awaited = self.error = None


class _Taken(NamedTuple):
    """A value of the model, and what it was when a block would have got it."""

    onlooker: _Onlooker
    look: Look
    value: Any  # as the block gets it
    tensors: Tensor | list[Tensor]  # those in it, which it may exchange later
    versions: int | list[int]


@final
class Glance:
    """What the blocks of one run ask; made before it."""

    def __init__(
        self,
        tree: Tree,
        kind: object,
        blocks: Iterable[tuple[Asked, Rows | None]],
        versions: Versions,
    ) -> None:
        self._tree = tree
        self._versions = versions
        self._onlookers = [_Onlooker(asked, rows, kind) for asked, rows in blocks]
        self._taken: list[_Taken] = []  # in the order in which the model came to it
        self.thread = _NO_THREAD

    @property
    def is_proven(self) -> bool:
        """Whether the model has served each block in an earlier run of this kind."""
        return all(onlooker.key in self._tree.proven for onlooker in self._onlookers)

    def prove(self, mediators: Iterable[Mediator]) -> None:
        """The model has served what was asked; remember that, if all of it was foreseen."""
        answers = [mediator.answers for mediator in mediators]
        if not all(each is not None and each.is_all for each in answers):
            return
        if len(self._tree.proven) >= _KEPT:
            self._tree.proven.clear()
        self._tree.proven.update(onlooker.key for onlooker in self._onlookers)

    def place(self, hooks: Hooks, mediators: Iterable[Mediator]) -> None:
        """Put the hooks on, in front of the user's own: a block sees what the module gave."""
        self.thread = hooks.thread
        places: dict[Site, _Place | None] = {}

        def place_of(site: Site) -> _Place | None:
            if site not in places:
                places[site] = self._placed(site, hooks)
            return places[site]

        for onlooker, mediator in zip(self._onlookers, mediators, strict=True):
            onlooker.expect(mediator, place_of)

    def _placed(self, site: Site, hooks: Hooks) -> _Place | None:
        if site.slot is Slot.RESULT:
            return None
        place, module = _Place([]), self._tree.modules[site.path]
        if site.slot is Slot.INPUT:
            hooks.look_at_inputs(module, partial(_see_inputs, self, place))
        else:
            begin, end = partial(_see_begin, self, place), partial(_see_output, self, place)
            hooks.look_at_output(module, begin, end)
        return place

    def end_step(self) -> None:
        """What comes from now on belongs to later steps."""
        self.thread = _NO_THREAD

    def see(self, place: _Place, value: Any) -> None:
        """The model is at `place` for the first time."""
        for onlooker in place.onlookers:
            if onlooker.awaited is not place:
                continue
            while onlooker.awaited is place:
                self._take(onlooker, value)
            if onlooker.awaited is not None and onlooker.awaited.has_passed:
                assert onlooker.look is not None
                onlooker.error = unserved.too_late(onlooker.look.visit, onlooker.last)
            if onlooker.error is not None:
                raise Unwind(onlooker.mediator)

    def _take(self, onlooker: _Onlooker, value: Any) -> None:
        look = onlooker.look
        assert look is not None
        if onlooker.rows is not None:
            try:
                value = onlooker.rows.narrow(look.visit, value).value
            except TracekitError as error:  # it is raised where the block asks
                onlooker.error, onlooker.awaited = error.with_traceback(None), None
                return
        if type(value) is Tensor and not value.is_inference():
            own, versions = value, value._version
        else:
            own = list(tensors(value))
            versions = list(map(version, own))
            if UNKNOWN in versions:
                self._versions.note_uncounted(look.visit, own)
        if look.part is not None or look.depth:
            value = look.shown(value)
        self._taken.append(_Taken(onlooker, look, value, own, versions))
        onlooker.go_on()

    def answer(self, results: list[Any], has_grad: bool) -> None:
        """Give each block what it will ask, as far as it came.

        `results` holds what the call returned, and nothing if it failed: then the blocks are left
        where they would still have waited.
        """
        for onlooker in self._onlookers if results else ():
            self._finish(onlooker, results[0])
        for onlooker, look, value, own, before in self._taken:
            onlooker.answers.put(look.visit, Reply(value))
            note_visit(look.visit, own, has_grad)
            if (own._version if isinstance(own, Tensor) else list(map(version, own))) != before:
                self._note_overwritten(look.visit, own, before)
            if onlooker.mediator is not None and onlooker.mediator.note is not None:
                onlooker.mediator.note("read", look.visit, value, look.line, True)
        for onlooker in self._onlookers:
            onlooker.hand_over()
        self.close()

    def _finish(self, onlooker: _Onlooker, result: Any) -> None:
        """The call has returned `result`: nothing else can be asked any more."""
        while onlooker.error is None and onlooker.look is not None:
            visit, last = onlooker.look.visit, onlooker.last
            if visit.site.slot is Slot.RESULT:
                self._take(onlooker, result)
            elif last is not None and last[0].site.slot is Slot.RESULT:
                onlooker.error = unserved.after_the_end(visit, last)
            else:
                onlooker.error = unserved.unlike_before(visit)

    def _note_overwritten(
        self, visit: Visit, own: Tensor | list[Tensor], before: int | list[int]
    ) -> None:
        for tensor, known in zip(_list(own), _list(before), strict=True):
            if version(tensor) != known:
                self._versions.note_overwritten(visit, tensor)

    def close(self) -> None:
        """Let go of all values."""
        self.thread = _NO_THREAD
        self._taken.clear()
        for onlooker in self._onlookers:
            onlooker.close()


def _see_begin(glance: Glance, place: _Place, module: nn.Module, args: Any) -> None:
    if not is_elsewhere(glance.thread):
        place.running += 1


# A module may call itself: its first call is the one that ends when none is running any more.
def _see_output(glance: Glance, place: _Place, module: nn.Module, args: Any, output: Any) -> None:
    if is_elsewhere(glance.thread):
        return
    place.running -= 1
    if not place.running and not place.has_passed:
        place.has_passed = True
        glance.see(place, output)


def _see_inputs(
    glance: Glance, place: _Place, module: nn.Module, args: Any, kwargs: Any = None
) -> None:
    if is_elsewhere(glance.thread) or place.has_passed:
        return
    place.has_passed = True
    glance.see(place, (args, kwargs))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _settled(value: Any, depth: int) -> Any:
    """`value` with containers of its own, so deep: the model may fill them with something else."""
    if isinstance(value, Tensor) or not depth:
        return value
    if depth > 1:
        return map_leaves(lambda leaf: leaf, value)
    is_filled = isinstance(value, (list, dict)) or is_dataclass(value)
    return copy(value) if is_filled else value
