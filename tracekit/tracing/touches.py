"""What each line of a block, and each function, did to the values of a run: before and after it."""

# This is what is claimed of an edit, by the machinery that makes it. Whether it came to be is told
# by hooks that know nothing of it (sightings.py).

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from torch import Tensor

from tracekit.core.nest import named_tensors
from tracekit.core.site import Line, Site, Visit
from tracekit.core.versions import Versions, changes
from tracekit.interleave.duties import Span
from tracekit.interleave.mediator import Mediator
from tracekit.tracing.sightings import Seen, copied

Leaf = tuple[Any, ...]  # the way to a tensor in a value


class Author(NamedTuple):
    """What made an edit, where that is no line of a block: a function, or a value, said in data."""

    kind: str
    what: str
    file: str
    line: int
    expected: int  # at how many places it is made
    writes: bool = False  # a value that does not depend on what was there


def of_code(
    kind: str, what: str, change: object, expected: int, fallback: tuple[str, int] = ("", 0)
) -> Author:
    """The author of an edit that a function makes, at the place where that stands, or a value."""
    code = getattr(inspect.unwrap(change), "__code__", None) if callable(change) else None
    file, line = fallback if code is None else (code.co_filename, code.co_firstlineno)
    return Author(kind, what, file, line, expected, writes=not callable(change))


@final
@dataclass(eq=False)
class Touch:
    """What one edit did to one tensor, at one visit."""

    seen: Seen
    step: int
    order: int  # how many edits came before
    clock: int  # how many values plain hooks had seen
    kind: str
    line: Line | str
    author: Author | None
    invoke: int | None
    span: Span | None  # of the rows that it was given; None: all
    leaf: Leaf
    place: int  # among the tensors of the value
    before: Tensor | None  # None: there was nothing
    after: Tensor
    read_at: tuple[str, ...]  # the lines at which its block had asked for the value by then
    is_there: bool | None = None  # as plain hooks saw it
    read_by: list[str] = field(default_factory=list[str])
    not_read_by: list[str] = field(default_factory=list[str])
    in_cache: bool | None = None
    overwritten_by: str = ""
    changed_again_by: str = ""

    @property
    def site(self) -> Site:
        """Where it is."""
        return self.seen.site

    @property
    def is_changed(self) -> Tensor:
        """Which elements it changed."""
        if self.before is None or self.before.shape != self.after.shape:
            return self.after.new_ones(self.after.shape).bool()
        same = self.after == self.before
        if self.after.is_floating_point():
            same = same | (self.after.isnan() & self.before.isnan())
        return ~same


@final
class Touches:
    """All touches of one run, in order."""

    def __init__(self, counts: Counter[Site]) -> None:
        self.every: list[Touch] = []
        self.authors: list[Author] = []  # of which each is to make an edit
        self.called: set[Author] = set()
        self.late: list[str] = []  # what changed a value that the model had gone on from
        self.is_inside = False  # of a function, which may call modules itself
        self.spans: dict[int, Span] = {}  # of the rows of each invoke
        self.counts = counts  # of what plain hooks have seen by now, by site
        self.clock = 0  # and in all
        self._waiting: dict[Seen, list[Touch]] = {}

    def follow(self, mediator: Mediator, invoke: int | None, author: Author | None) -> None:
        """Take note of what `mediator` carries."""
        rows = mediator.rows
        span = None if rows is None or rows.is_all else rows.span
        if invoke is not None and span is not None:
            self.spans[invoke] = span
        self.expect(author)
        mediator.keeper = Keeper(self, invoke, author, span)

    def expect(self, author: Author | None) -> None:
        """There is this edit, which may never come to be."""
        if author is not None and author not in self.authors:
            self.authors.append(author)

    def of_function(
        self, site: Site, step: int, author: Author, change: Callable[[Any], Any], value: Any
    ) -> Any:
        """What `change`, a function that is called in the forward pass, makes of a value."""
        keeper = Keeper(self, None, author, None)
        keeper.begin(Visit(site, step), value)
        self.is_inside = True
        try:
            new = change(value)
        finally:
            self.is_inside = False
        keeper.end(new)
        return new

    def seen(self, visit: Visit) -> Seen:
        """The value at which the model is, among all of its site in the run."""
        return Seen(visit.site, self.counts[visit.site])

    def add(self, touch: Touch) -> None:
        """One more; plain hooks will see what it came to."""
        self.every.append(touch)
        self._waiting.setdefault(touch.seen, []).append(touch)

    def drop_last(self) -> None:
        """The last one was none."""
        last = self.every.pop()
        self._waiting[last.seen].remove(last)

    def arrived(self, seen: Seen) -> Sequence[Touch]:
        """What was done to a value that plain hooks see now."""
        return self._waiting.pop(seen, ())


@final
class Keeper:
    """Notes what one block, or function, does to the value that it has."""

    def __init__(
        self, touches: Touches, invoke: int | None, author: Author | None, span: Span | None
    ) -> None:
        self._touches = touches
        self._given = invoke, author, span
        self._visit: Visit | None = None
        self._line: Line | str = ""
        self._known: dict[Leaf, _Copy] = {}
        self._read_at: list[str] = []
        self._past = Versions()  # of what the block had before

    def begin(self, visit: Visit, value: Any) -> None:
        """The block is about to be given this value."""
        self._visit, self._line = visit, ""
        self._read_at.clear()
        author = self._given[1]
        if author is not None:
            self._touches.called.add(author)
        self._look(value)
        self._past.changed()  # by the model, meanwhile

    def came(self, kind: str, value: Any, line: str) -> None:
        """The block has the value that it asked for at this line, or wrote one there."""
        self._line = line
        if kind == "read":
            self._read_at.append(line)
        else:
            self._compare(kind, value, line)

    def again(self, value: Any, line: str) -> None:
        """The block asks for the value a second time: what it did meanwhile was the line before."""
        self._compare("in place", value, self._line)
        self._line = line
        self._read_at.append(line)

    def wrote(self, now: Any, new: Any, line: str) -> None:
        """The block writes, behind what it did to the value that it has."""
        if new is not now:
            self._compare("in place", now, self._line)
        self._compare("write", new, line)
        self._line = line

    def prepared(self, value: Any) -> None:
        """The last write was no edit of the block's: a copy was put there for it to edit."""
        self._touches.drop_last()
        self._look(value)

    def end(self, value: Any) -> None:
        """The model goes on with this value."""
        self._compare("in place", value, self._line)
        self._look_back(value)
        self._known.clear()
        self._visit = None

    def _look_back(self, value: Any) -> None:
        """Whether the block has changed, by now, what it had been given before this value."""
        assert self._visit is not None
        given = [known.tensor for known in self._known.values()]
        for label in dict.fromkeys(self._past.changed((value, given))):
            self._touches.late.append(
                f"{label} was changed in place behind {self._line}, when the model had gone on to "
                f"{self._visit.site}: what read it before has what was there. Change it where it "
                f"is asked for."
            )
        self._past.note(self._visit.site, value)

    def _compare(self, kind: str, value: Any, line: Line | str) -> None:
        """Add what was changed since the last look; a write also where it changed nothing."""
        is_write = kind != "in place"
        named = enumerate(named_tensors(value))
        moved = [(place, *it) for place, it in named if self._has_moved(*it, is_write)]
        is_skip = kind == "skip"  # there is nothing in front of it
        changed = [each for each in moved if is_skip or self._is_changed(*each[1:])]
        rest = [] if self._has_touched(line) else moved[:1]
        for place, leaf, tensor in changed or rest:
            self._add(kind, place, leaf, tensor, line)
        if moved:
            self._look(value)

    def _has_touched(self, line: Line | str) -> bool:
        """Whether the line has changed the value already: `x += v` changes, and writes."""
        assert self._visit is not None
        last = self._touches.every[-1] if self._touches.every else None
        return (
            last is not None and last.line == line and last.seen == self._touches.seen(self._visit)
        )

    def _has_moved(self, leaf: Leaf, tensor: Tensor, is_write: bool) -> bool:
        known = self._known.get(leaf)
        return is_write or known is None or not known.is_untouched(tensor)

    def _is_changed(self, leaf: Leaf, tensor: Tensor) -> bool:
        known = self._known.get(leaf)
        return known is None or not known.is_equal(tensor)

    def _add(self, kind: str, place: int, leaf: Leaf, tensor: Tensor, line: Line | str) -> None:
        assert self._visit is not None
        invoke, author, span = self._given
        known = self._known.get(leaf)
        line = line if author is None else Line(author.file, author.line)
        self._touches.add(
            Touch(
                self._touches.seen(self._visit),
                self._visit.step,
                len(self._touches.every),
                self._touches.clock,
                author.kind if author is not None else _KINDS[kind],
                line,
                author,
                invoke,
                span,
                leaf,
                place,
                None if known is None or kind == "skip" else known.value,
                copied(tensor),
                tuple(self._read_at),
            )
        )

    def _look(self, value: Any) -> None:
        self._known = {leaf: _Copy(tensor) for leaf, tensor in named_tensors(value)}


_KINDS = {"write": "assigned", "skip": "skip", "in place": "in place"}


@final
class _Copy:
    """A tensor, and what it was."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = changes(tensor)
        self.value = copied(tensor)

    def is_untouched(self, tensor: Tensor) -> bool:
        """Whether it is the same one, and nothing wrote into it."""
        if tensor is not self.tensor or changes(tensor) != self._version:
            return False
        return self._version >= 0 or self.is_equal(tensor)  # which counts no versions

    def is_equal(self, tensor: Tensor) -> bool:
        """Whether it has the same numbers."""
        now = tensor.detach().cpu()
        if now.shape != self.value.shape or now.dtype != self.value.dtype:
            return False
        same = now == self.value
        if now.is_floating_point():
            same = same | (now.isnan() & self.value.isnan())
        return bool(same.all())
