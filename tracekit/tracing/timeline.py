"""Which tokens each forward of a run went over, and which of them are in what it ended with."""

# A position is a column of the batch of final sequences, padding included; a row's own positions
# count its tokens alone. Forwards are not steps: a prompt in chunks takes several, guidance adds a
# branch, drafts are made of tokens that are then rejected.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from tracekit.core.annex import axis_of_positions
from tracekit.core.nest import describe, first_input, first_tensor
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import UnsupportedError
from tracekit.interleave.duties import Span

PADDING = -1  # the own position of what is no token of its row
NO_TOKEN = -1  # in the place of a token where only an embedding was given


class Pass(NamedTuple):
    """One forward of the decoder: over the positions from `start` to `start + length`."""

    place: int  # among all of the run
    step: int
    rows: int
    start: int
    length: int
    kept: int = 0  # the last so many of them alone have logits; 0: all
    is_main: bool = True  # neither a draft nor the other branch of guidance

    @property
    def stop(self) -> int:
        """The first position behind it."""
        return self.start + self.length


@final
@dataclass(frozen=True)
class Transcript:
    """The tokens that a run ended with.

    `tokens`: `[rows, length]`; `is_real`: the same shape, False for padding and behind the end of
    a row; `prompt`: how many columns were given; `lineage`: `[rows, length]`, where beams changed
    places: which of the `batch` rows computed each position (PADDING: none did).
    """

    tokens: Tensor
    is_real: Tensor
    prompt: int
    lineage: Tensor | None = None
    batch: int = 0

    def narrowed(self, span: Span) -> Transcript:
        """The rows of one block."""
        own = span.of(self.tokens.shape[0])
        if self.lineage is None:
            return Transcript(self.tokens[own], self.is_real[own], self.prompt)
        batch, lineage = span.of(self.batch), self.lineage[own]
        lineage = torch.where(lineage == PADDING, lineage, lineage - batch.start)
        size = batch.stop - batch.start
        return Transcript(self.tokens[own], self.is_real[own], self.prompt, lineage, size)

    def own_positions(self) -> Tensor:
        """`[rows, length]`: each token's place in its own row, PADDING for what is none."""
        return own_positions(self.is_real)


class Rerunning(Protocol):
    """Runs the model again over the tokens of a transcript, in one forward."""

    @property
    def tree(self) -> Tree:
        """The model; CacheError if it is gone."""
        ...

    def told(self) -> dict[str, Any]:
        """What it runs on, for a file; UnsupportedError if it can't be told."""
        ...

    def __call__(self, transcript: Transcript, include_last: bool) -> None:
        """One forward over all tokens, or all but the last."""
        ...


@final
class Timeline:
    """The forwards of one run, as they come, and its Transcript when it is over."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.lengths: list[int] = []  # of the sequences, at the end of each step
        self.prompt: int | None = None  # columns, where they are known before the first forward
        self.prompt_mask: Tensor | None = None  # [rows, prompt], where there is padding
        self.tell: Callable[[], Transcript | None] | None = None  # while it runs: so far
        self._transcript: Transcript | None = None
        self.is_generation = False
        self.is_behind_prefix = False  # which was made with the lasting edits of the run
        self.is_beginning = False  # of a prompt whose end is not known yet
        self.untouched = 0  # so many positions are not to be edited: a prefix was there before
        self.rerun: Rerunning | None = None
        self.model: ReferenceType[nn.Module] | None = None  # that ran
        self.is_wanted = False  # somebody asks, or may ask while the run goes on
        self._subscribers: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, object]:
        of_the_run = {
            "rerun": None,
            "model": None,
            "tell": None,
            "_subscribers": [],
        }  # no model is copied along
        return {**vars(self), **of_the_run}

    @property
    def transcript(self) -> Transcript | None:
        """The tokens that the run ended with, or has so far; None where they are not known."""
        return self._transcript if self.tell is None else self.tell()

    @transcript.setter
    def transcript(self, transcript: Transcript | None) -> None:
        self._transcript = transcript

    @property
    def current(self) -> Pass | None:
        """The forward that runs, or ran last; None before the first."""
        return self.passes[-1] if self.passes else None

    def subscribe(self, begins: Callable[[], None]) -> None:
        """Call `begins` at the beginning of every forward to come."""
        self._subscribers.append(begins)
        self.is_wanted = True

    def begin(
        self, step: int, rows: int, start: int, length: int, kept: int = 0, is_main: bool = True
    ) -> None:
        """A forward begins, over so many positions from `start` on."""
        for begins in self._subscribers:
            begins()
        self.passes.append(Pass(len(self.passes), step, rows, start, length, kept, is_main))

    def end_step(self, length: int) -> None:
        """A step has ended, with sequences of so many tokens."""
        self.lengths.append(length)

    def narrowed(self, span: Span) -> Timeline:
        """That of the rows of one block."""
        other = Timeline()
        other.passes, other.lengths, other.prompt = self.passes, self.lengths, self.prompt
        other.rerun, other.model = self.rerun, self.model
        if self.transcript is not None:
            other.transcript = self.transcript.narrowed(span)
        return other

    def close(self) -> None:
        """The run is over."""
        self.tell = None
        self._subscribers.clear()

    def first_generated(self, one: Pass) -> int:
        """The first position behind the prompt, as far as a forward needs to know."""
        if self.prompt is not None:
            return self.prompt
        ends = [each.stop for each in self.passes if each.step == 0 and each.is_main]
        return max(ends) if one.step else max(one.stop, *ends)

    def own_positions(self, one: Pass) -> Tensor:
        """`[rows, length]`: the own positions of what a forward goes over."""
        mask = self.prompt_mask
        if mask is None:
            return torch.arange(one.start, one.stop).expand(one.rows, -1)
        behind = max(0, one.stop - mask.shape[1])
        longer = torch.cat([mask, mask.new_ones(mask.shape[0], behind)], 1)
        own = own_positions(longer)[:, one.start : one.stop]
        return own.repeat_interleave(one.rows // mask.shape[0], 0)

    def own_prompt(self, prompt: int, rows: int) -> Tensor:
        """`[rows]`: how many tokens of each row come before the column `prompt`."""
        mask = self.prompt_mask
        if mask is None:
            return torch.full((rows,), prompt)
        counted = mask[:, :prompt].long().sum(-1) + max(0, prompt - mask.shape[1])
        return counted.repeat_interleave(rows // mask.shape[0], 0)

    def spans(self) -> list[tuple[int, int]]:
        """For each forward, the positions of it that are in the result, each in one forward alone.

        That which came to it first: with keys and values kept, there is no other.
        """
        found: list[tuple[int, int]] = []
        covered = 0
        certain = self._certain()
        for one in self.passes:
            stop = min(one.stop, certain[one.step]) if one.is_main else 0
            start = max(one.start, covered)
            found.append((start, max(start, stop)))
            covered = max(covered, stop)
        return found

    @property
    def total(self) -> int:
        """How many positions ran: all but the last token, which nobody needs to go over."""
        certain = self._certain()
        stops = (min(one.stop, certain[one.step]) for one in self.passes if one.is_main)
        return max(stops, default=0)

    def _certain(self) -> list[int]:
        """For each step, how many positions are certain when it is over.

        The last token of a step is the next one's; in a step that was left, all were there before.
        Beams that were left behind may have come further than those in the result.
        """
        known = self.passes[-1].stop if self.passes else 0
        if self.transcript is not None:
            known = self.transcript.tokens.shape[1]
        was_left = bool(self.passes) and self.passes[-1].step >= len(self.lengths)
        run = known if was_left or self.transcript is None else known - 1
        return [*(min(length - 1, run) for length in self.lengths), known]

    @property
    def first(self) -> int:
        """The first position that ran: not 0 where keys and values of a prefix were there."""
        return min((one.start for one in self.passes if one.is_main), default=0)


def tensor_of(slot: Slot, value: Any) -> Tensor | None:
    """The tensor whose positions are meant: the first of an output, or of the first input."""
    return first_tensor(first_input(value) if slot is Slot.INPUT else value)


def by_rows(value: Tensor, axis: int, rows: int, count: int) -> Tensor:
    """`[rows, count, ...]`, a view of `value`, which has its positions in `axis`."""
    return value.unflatten(0, (rows, count)) if axis == 0 else value.movedim(axis, 1)


def axis_of(site: Site, value: Tensor, one: Pass) -> tuple[int, int]:
    """Where the positions of a forward are in `value`, and how many.

    Axis 1 or 2, or 0 with rows and positions in one; UnsupportedError if nowhere.
    """
    kept = one.kept if 0 < one.kept < one.length else one.length
    known = axis_of_positions(site.path, value.dim())
    if known is not None and value.shape[known] == one.length:
        return known, one.length
    if known is not None:
        raise UnsupportedError(
            f"{site} is {describe(value)} in a forward over {one.length} positions, with those of "
            f"the kv_cache in front: choose them by hand, or edit .k_proj or the like."
        )
    if value.dim() > 3 and one.length > 1 and value.shape[1] == value.shape[2] == one.length:
        raise UnsupportedError(
            f"{site} is {describe(value)}, and two of its axes may be the {one.length} positions: "
            f"run it on another number of tokens."
        )
    for count in (one.length, kept):
        for axis in (1, 2, 0):
            if fits(value, axis, count, one.rows):
                return axis, count
    raise UnsupportedError(
        f"{site} is {describe(value)} in a forward over {one.length} positions of {one.rows} "
        f"rows: it has no value for each position."
    )


def fits(value: Tensor, axis: int, count: int, rows: int) -> bool:
    """Whether the positions may be in this axis of `value`; in 0 they are one with the rows.

    Behind heads, in axis 2, they are where there are features as well.
    """
    if axis == 0:
        return value.dim() > 1 and value.shape[0] == rows * count
    return (
        value.dim() > (1 if axis == 1 else 3)
        and value.shape[axis] == count
        and value.shape[0] in (1, rows)
    )


def own_positions(is_real: Tensor) -> Tensor:
    """Each token's place among the real ones of its row, from 0; PADDING for the others."""
    counted = is_real.long().cumsum(-1) - 1
    return counted.masked_fill(~is_real.bool(), PADDING)
