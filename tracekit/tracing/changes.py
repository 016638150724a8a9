"""What was changed in a run, and at which positions: enough to make the same changes again."""

# A block's edit is kept as the values before and after it, so that a replay that meets other values
# (a fault) ends with other values, too; what stands in for a skipped module is kept as it is.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, final

from torch import Tensor

from tracekit.core.nest import tensors
from tracekit.core.site import Site, Visit
from tracekit.core.versions import changes
from tracekit.interleave.duties import Span
from tracekit.tracing.at import PositionEdit
from tracekit.tracing.timeline import Pass, Timeline


class How(Enum):
    """In which way a value was changed."""

    IN_PLACE = "in place"
    REPLACED = "replaced"
    SKIPPED = "skipped"


class Change(NamedTuple):
    """What a block did to one tensor of one value."""

    site: Site
    during: Pass | None
    step: int
    call: int  # in that step
    leaf: int  # the how-manieth tensor of the value
    how: How
    value: Tensor | None  # what stands in its place; None: of another shape, or no numbers
    before: Tensor | None = None  # what was there; None where a module was skipped


@final
class Changes:
    """The changes of one run, in order, beside its timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.later: Callable[[], list[Change]] | None = None  # what was made, from a file
        self._made: list[Change] = []
        self.is_wanted = False  # a cache is being filled, which may be verified
        self.missed: Visit | None = None  # the first that was changed before that
        self.at_positions: list[PositionEdit] = []
        self.span: Span | None = None  # of the rows of one block
        self._of: Changes | None = None  # those of all rows, if these are not

    def __reduce__(self) -> tuple[Any, ...]:
        return Changes, (self.timeline,)  # without the model they can't be made again

    @property
    def made(self) -> list[Change]:
        """The changes, in order."""
        if self.later is not None:
            self._made, self.later = self.later(), None
        return self._made

    @property
    def whole(self) -> Changes:
        """Those of all rows."""
        return self if self._of is None else self._of

    def look(self, visit: Visit, value: object) -> list[_Look | _Glimpse]:
        """What becomes of `value`, if anybody will ask."""
        if not self.timeline.is_generation:
            return []
        return [_Look(self, visit, value) if self.is_wanted else _Glimpse(self, visit, value)]

    def narrowed(self, span: Span) -> Changes:
        """Those of the rows of one block."""
        other = Changes(self.timeline.narrowed(span))
        other._of, other.span = self, span
        return other


@final
class Rounds:
    """Which edits of tokens a block that runs anew in each step has made in earlier ones."""

    def __init__(self) -> None:
        self._made: Counter[tuple[Site, str, str]] = Counter()
        self._now: Counter[tuple[Site, str, str]] = Counter()
        self._round: object = None

    def has(self, edit: PositionEdit, now: object) -> bool:
        """Whether an earlier round made this edit, as often as the round `now` has come to it."""
        if now is not self._round:
            self._round = now
            self._now.clear()
        key = (edit.site, edit.line, repr(edit.chosen))
        self._now[key] += 1
        self._made[key] = max(was := self._made[key], self._now[key])
        return self._now[key] <= was


@final
class _Look:
    """The tensors of a value before blocks saw it."""

    def __init__(self, owner: Changes, visit: Visit, value: Any) -> None:
        self._owner = owner
        self._visit = visit
        self.is_skipped = False  # a block lets it stand in for a module
        self._before = [(each, changes(each), each.detach().clone()) for each in tensors(value)]

    def note(self, value: Any) -> None:
        """The model goes on with `value`."""
        one = self._owner.timeline.current
        if one is not None and not one.is_main:
            return
        for leaf, (after, before) in enumerate(zip(tensors(value), self._before, strict=False)):
            changed = _change(after, *before, self.is_skipped)
            if changed is not None:
                visit = self._visit
                self._owner.made.append(
                    Change(visit.site, one, visit.step, visit.call, leaf, *changed)
                )


@final
class _Glimpse:
    """Whether a value is changed, where nobody will ask how."""

    def __init__(self, owner: Changes, visit: Visit, value: Any) -> None:
        self._owner = owner
        self._visit = visit
        self.is_skipped = False
        self._before = [(each, changes(each)) for each in tensors(value)]

    def note(self, value: Any) -> None:
        """The model goes on with `value`."""
        now = [(each, changes(each)) for each in tensors(value)]
        is_same = len(now) == len(self._before) and all(
            one is was and version == then
            for (one, version), (was, then) in zip(now, self._before, strict=True)
        )
        if self._owner.missed is None and (self.is_skipped or not is_same):
            self._owner.missed = self._visit


def _change(
    after: Tensor, was: Tensor, version: int, before: Tensor, is_skipped: bool
) -> tuple[How, Tensor | None, Tensor | None] | None:
    if is_skipped:
        return How.SKIPPED, after.detach().clone(), None
    is_same = after is was
    if is_same and changes(after) == version and version >= 0:
        return None
    how = How.IN_PLACE if is_same else How.REPLACED
    if after.shape == before.shape and bool((after.detach() == before).all()):
        return None  # a copy, as what is written beside a tensor of a tuple
    if after.shape != before.shape or not before.is_floating_point():
        return how, None, None
    return how, after.detach().clone(), before
