"""Stored reads of a whole block, filled by hooks alone: no request is made, and nobody waits."""

# Of some blocks all is known that they will ask. They need nothing of the interleaver, if the model
# serves them in that order; whether it does shows in a run with requests (ahead.py). So the first
# run makes them, and what went well is remembered with the model. From then on the hooks of a
# block's own modules do what the interleaver would:
#   - a value is taken where the block would be waiting for it, of the first call in the first step;
#   - where what it asks for next has passed, the run ends, with the error that says so.

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias, final

from torch import Tensor, nn

from tracekit.core.nest import map_leaves, tensors
from tracekit.core.origins import note_visit
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import UNKNOWN, Versions, version
from tracekit.interleave import unserved
from tracekit.interleave.answers import Answers
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

    running: int = 0
    has_passed: bool = False


# A value as the block gets it; the tensors in it, which it may exchange later; their versions then.
_Taken: TypeAlias = tuple[Any, Tensor | list[Tensor], int | list[int]]


@final
class Glance:
    """What one block asks, in one run; made before it."""

    def __init__(self, tree: Tree, kind: object, asked: Asked) -> None:
        self._tree = tree
        self._asked = asked
        self._looks = asked.looks
        self._key = (kind, tuple([look.visit for look in asked.looks]))
        self.thread = _NO_THREAD
        self._places: list[_Place | None] = []  # for each look; None is the result of the call
        self.awaited: _Place | None = None
        self._taken: list[_Taken] = []  # for each look, as far as the model has come
        self._is_late = False  # what comes next in the block has passed
        self._mediator: Mediator | None = None
        self._versions: Versions | None = None

    @property
    def is_proven(self) -> bool:
        """Whether the model has served the block in an earlier run of this kind."""
        return self._key in self._tree.proven

    def prove(self) -> None:
        """The model has served all that was asked."""
        if len(self._tree.proven) >= _KEPT:
            self._tree.proven.clear()
        self._tree.proven.add(self._key)

    def place(self, hooks: Hooks, mediator: Mediator, versions: Versions) -> None:
        """Put the hooks on, in front of the user's own: a block sees what the module gave."""
        self.thread = hooks.thread
        self._mediator, self._versions = mediator, versions
        places: dict[Site, _Place | None] = {}
        modules = self._tree.modules
        for look in self._looks:
            site = look.visit.site
            if site not in places:
                places[site] = self._placed(site, hooks, modules)
            self._places.append(places[site])
        self.awaited = self._places[0] if self._places else None

    def _placed(self, site: Site, hooks: Hooks, modules: dict[str, nn.Module]) -> _Place | None:
        if site.slot is Slot.RESULT:
            return None
        place = _Place()
        if site.slot is Slot.INPUT:
            hooks.look_at_inputs(modules[site.path], partial(_see_inputs, self, place))
        else:
            begin, end = partial(_see_begin, self, place), partial(_see_output, self, place)
            hooks.look_at_output(modules[site.path], begin, end)
        return place

    def end_step(self) -> None:
        """What comes from now on belongs to later steps."""
        self.thread = _NO_THREAD

    def see(self, place: _Place, value: Any) -> None:
        """The model is at `place`, for which the block would wait."""
        awaited: _Place | None = place
        while awaited is place:
            awaited = self._take(value)
        if awaited is not None and awaited.has_passed:
            self._is_late = True
            raise Unwind(self._mediator)

    def _take(self, value: Any) -> _Place | None:
        taken, places = self._taken, self._places
        look = self._looks[len(taken)]
        if type(value) is Tensor and not value.is_inference():
            own, versions = value, value._version
        else:
            own = list(tensors(value))
            versions = list(map(version, own))
            if UNKNOWN in versions:
                assert self._versions is not None
                self._versions.note_uncounted(look.visit, own)
        if look.part is not None or look.depth:
            value = look.shown(value)
        taken.append((value, own, versions))
        self.awaited = awaited = places[len(taken)] if len(taken) < len(places) else None
        return awaited

    def answer(self, mediator: Mediator, results: list[Any], has_grad: bool) -> None:
        """Give the block of `mediator` what it will ask, as far as it came.

        `results` holds what the call returned, and nothing if it failed: then the block is left
        where it would still have waited.
        """
        answers = Answers(0, is_all=True)
        answers.is_as_it_was = self._asked.is_as_it_was
        answers.look_again()
        for look, taken in zip(self._looks, self._taken, strict=False):
            self._put(answers, look, taken, mediator, has_grad)
        missing = self._looks[len(self._taken) :]
        while missing and missing[0].visit.site.slot is Slot.RESULT and results:
            look, *missing = missing
            self._take(results[0])
            self._put(answers, look, self._taken[-1], mediator, has_grad)
        if missing:
            error = self._missed(len(self._taken), mediator, bool(results))
            answers.put(missing[0].visit, Reply(error=error))
        self.close()
        mediator.remember(answers)

    def _put(
        self, answers: Answers, look: Look, taken: _Taken, mediator: Mediator, has_grad: bool
    ) -> None:
        value, own, before = taken
        answers.put(look.visit, Reply(value))
        note_visit(look.visit, own, has_grad)
        if (own._version if isinstance(own, Tensor) else list(map(version, own))) != before:
            assert self._versions is not None
            for tensor, known in zip(_list(own), _list(before), strict=True):
                if version(tensor) != known:
                    self._versions.note_overwritten(look.visit, tensor)
        if mediator.note is not None:
            mediator.note("read", look.visit, value, look.line, True)

    def _missed(self, index: int, mediator: Mediator, has_ended: bool) -> BaseException:
        visit = self._looks[index].visit
        before = self._looks[index - 1] if index else None
        last = (before.visit, before.line) if before is not None else None
        if self._is_late:
            return unserved.too_late(visit, last)
        if not has_ended:
            return Unwind(mediator)
        if before is not None and before.visit.site.slot is Slot.RESULT:
            return unserved.after_the_end(visit, last)
        return unserved.unlike_before(visit)

    def close(self) -> None:
        """Let go of all values."""
        self.thread = _NO_THREAD
        self._taken.clear()
        self._mediator = self._versions = self.awaited = None


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
        if glance.awaited is place:
            glance.see(place, output)


def _see_inputs(
    glance: Glance, place: _Place, module: nn.Module, args: Any, kwargs: Any = None
) -> None:
    if is_elsewhere(glance.thread) or place.has_passed:
        return
    place.has_passed = True
    if glance.awaited is place:
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
