"""What a verified run found: for each edit, where it landed, and what it did to everything else."""

# Positions count each row's own tokens from 0, as `.at(...)` does; padding is PADDING (-1).

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast, final

from tracekit.tracing.verified.telling import told


@final
@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: a stable `slug`, and a sentence for people.

    `edit` is the index, among the report's edits, of the one that it is about; None: of the run.
    """

    slug: str
    text: str
    edit: int | None = None


@final
@dataclass(frozen=True)
class Touched:
    """What of one row an edit changed: its positions, with the text of their tokens.

    Without positions, the value has none that could be told.
    """

    row: int
    positions: tuple[int, ...] | None
    tokens: tuple[str, ...] | None


@final
@dataclass(frozen=True)
class Landing:
    """What an edit did to one value.

    `absolute` is the norm of the change, `relative` that over the norm of the clean value at the
    elements that were changed (inf: over zero), `largest` the greatest change of one element.
    `is_there`: plain hooks saw the module give, or be given, what was written; None where no hook
    can look (an operation, a value inside an attention). `read_by`: modules that took it in as it
    was written. `in_cache`: the entry of the run's cache is what was written; None: there is none.
    """

    site: str  # "model.layers.3.output"
    step: int
    call: int  # the how-manieth call of the module in the run
    rows: tuple[Touched, ...]  # those that were changed
    features: tuple[int, int] | None  # how many of how many were changed, along the last axis
    elements: tuple[int, int]  # changed, of all
    absolute: float
    relative: float
    largest: float
    is_there: bool | None = None
    read_by: tuple[str, ...] = ()
    in_cache: bool | None = None
    overwritten_by: str = ""  # the line that wrote something else there later
    changed_again_by: str = ""  # the line that went on from what was written

    @property
    def path(self) -> str:
        """The module, or the operation, whose value it is."""
        return self.site.rpartition(".")[0]


@final
@dataclass(frozen=True)
class EditCheck:
    """One edit: where it stands, how often it fired, and what became of it.

    `kind`: "assigned", "in place", "skip", "hook", "positions", "function". `expected`: at how many
    modules it was to fire; None where nothing says so.
    """

    index: int
    kind: str
    what: str  # the site, or several in short
    file: str
    line: int
    source: str  # of that line
    invoke: int | None  # the how-manieth block of the trace; None: a lasting edit, a hook
    fired: int
    expected: int | None
    landings: tuple[Landing, ...]
    verdict: str  # "as written", or the slugs of its problems

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.verdict == "as written"


@final
@dataclass(frozen=True)
class ModuleChange:
    """How far a value of a module is from that of the clean run.

    `largest` is the greatest difference of one element, `relative` the norm of the difference over
    that of the clean value; None where only that it differs is known (see the report's notes).
    `order`: its place among all values of the run.
    """

    site: str
    call: int
    order: int
    largest: float | None
    relative: float | None
    rows: tuple[int, ...]


@final
@dataclass(frozen=True)
class RowCheck:
    """One row of the batch: whether it was edited, and how far its values are from the clean run.

    `deviation` is the greatest difference over the largest clean value of its site, and 0.0 where
    every bit is the same; `verdict` is "edited", "bit-identical", "within rounding", "changed" or
    "not compared" (the values that differ have no rows that could be told).
    """

    row: int
    invoke: int | None
    text: str  # of its tokens
    verdict: str
    deviation: float


@final
@dataclass(frozen=True)
class Flip:
    """A position whose likeliest token is another after the edit."""

    row: int
    position: int
    was: str
    is_now: str


@final
@dataclass(frozen=True)
class LogitsChange:
    """What became of the predictions, for each row a number for each of `positions`.

    `total_variation` is half the sum of the absolute differences of the probabilities, from 0 to 1;
    `divergence` is KL(clean || edited), in nats.
    """

    positions: tuple[tuple[int, ...], ...]  # of each row, padding left out
    total_variation: tuple[tuple[float, ...], ...]
    divergence: tuple[tuple[float, ...], ...]
    flips: tuple[Flip, ...]
    largest: float  # the greatest difference of one logit


@final
@dataclass(frozen=True)
class PrecisionCheck:
    """The same edit in float32 beside that in the model's own dtype.

    `effect` and `effect_in_float32`: the total variation of the logits at its greatest, or, without
    logits, the norm of the change of the result over its norm. `how`: what was run in float32, the
    "edit" itself or the "changes" that it had made.
    """

    dtype: str
    effect: float
    effect_in_float32: float
    how: str
    verdict: str


@final
@dataclass(frozen=True)
class EditReport:
    """What `model.verify(edit, inputs)`, or a trace with `verify=True`, found. True if all is well.

    Print it. `problems` are named by stable slugs; `edits` are in the order of the run. `before`
    counts the values that came before the first edit, `changed_before` are those of them that are
    not bit-identical to the clean run; `after` has those that differ behind it, in order.
    """

    edits: tuple[EditCheck, ...]
    problems: tuple[Problem, ...]
    before: int
    changed_before: tuple[ModuleChange, ...]
    after: tuple[ModuleChange, ...]
    unchanged_after: int  # values behind the first edit that are bit-identical
    rows: tuple[RowCheck, ...]
    logits: LogitsChange | None
    result: float  # the norm of the change of what the model returned, over that of it
    precision: PrecisionCheck | None
    tokens: tuple[tuple[str, ...], ...]  # of each row, padding left out
    forwards: int  # how many forward passes were made, that with the edits too
    notes: tuple[str, ...]

    @property
    def first(self) -> ModuleChange | None:
        """The first value behind the edit that differs from the clean run."""
        return self.after[0] if self.after else None

    @property
    def verdict(self) -> str:
        """In one line, what came of it."""
        if not self.problems:
            return "VERIFIED"
        return "NOT VERIFIED: " + ", ".join(dict.fromkeys(each.slug for each in self.problems))

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        return told(self)

    def expect(
        self,
        *,
        rows: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        modules: Sequence[str] | str | None = None,
    ) -> EditReport:
        """This report, judged by what was meant: which rows, positions and modules are edited.

        Each is all that may be touched, and must be. Positions count a row's own tokens from 0, or
        back from its end; modules are paths, with or without the model's name and `*` for a part.
        """
        from tracekit.tracing.verified.expecting import Meant, with_expectation

        return with_expectation(self, Meant.of(rows, positions, modules))

    def with_problems(self, found: Sequence[Problem]) -> EditReport:
        """This report, with these problems too."""
        problems = (*self.problems, *(each for each in found if each not in self.problems))
        return replace(self, problems=problems, edits=_judged(self.edits, problems))

    def to_json(self) -> dict[str, Any]:
        """What it holds, in dictionaries, lists, strings and numbers."""
        return {"verdict": self.verdict, **_plain(self)}


def _judged(edits: Sequence[EditCheck], problems: Sequence[Problem]) -> tuple[EditCheck, ...]:
    """The edits, each with the verdict that the problems give."""
    found: list[EditCheck] = []
    for edit in edits:
        slugs = dict.fromkeys(each.slug for each in problems if each.edit == edit.index)
        found.append(replace(edit, verdict=", ".join(slugs) or "as written"))
    return tuple(found)


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in cast("Sequence[object]", value)]
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        return {str(key): _plain(each) for key, each in items.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
