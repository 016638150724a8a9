"""Make the changes of a run again, at the same positions, in one forward over all its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from tracekit.core.nest import replace_tensor, tensors
from tracekit.core.site import Site
from tracekit.errors import CacheError, TracekitError
from tracekit.tracing.changes import Change, Changes, How
from tracekit.tracing.sequence import Laid, lay_out
from tracekit.tracing.timeline import Pass, Timeline, Transcript, by_rows

# Largest deviation, over the largest value of the site, that steps under kept keys and values and
# one forward may differ by: float32 was measured at 4e-7, bfloat16 at 5e-3.
TOLERANCES: Final = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}


class _Again(NamedTuple):
    """A change to make again: of what call in a forward, which tensor, how, to what, from what."""

    call: int
    leaf: int
    how: How
    laid: Laid | Tensor  # a Tensor: all of a value that no forward of the decoder gave
    before: Tensor | None  # in the same layout


@final
class Replay:
    """What changes the values of one forward over the tokens of `transcript`.

    CacheError for changes that can't be made in one forward.
    """

    def __init__(self, changes: Changes, transcript: Transcript, length: int) -> None:
        rows = transcript.tokens.shape[0]
        self.one = Pass(0, 0, rows, 0, length)
        self._at_positions = changes.at_positions
        self._timeline = Timeline()
        self._timeline.passes.append(self.one)
        self._timeline.prompt = transcript.prompt
        self._timeline.untouched = changes.timeline.first
        self._timeline.is_behind_prefix = changes.timeline.is_behind_prefix
        prompt = transcript.is_real[:, : transcript.prompt]
        self._timeline.prompt_mask = None if bool(prompt.all()) else prompt
        self._again: defaultdict[Site, list[_Again]] = defaultdict(list)
        for site, again in _made_again(changes, transcript):
            self._again[site].append(again)

    @property
    def sites(self) -> set[Site]:
        """Where something is changed."""
        return {*self._again, *(edit.site for edit in self._at_positions)}

    def change(self, site: Site, call: int, value: Any) -> Any:
        """`value`, of the `call`-th visit to `site`, as the model is to go on with it."""
        for edit in self._at_positions:
            if edit.site == site:
                value = edit.apply(value, self.one, self._timeline)
        for again in self._again.get(site, ()):
            if again.call == call:
                value = _changed(value, again, self.one)
        return value


def _made_again(changes: Changes, transcript: Transcript) -> Iterator[tuple[Site, _Again]]:
    groups: defaultdict[tuple[Site, int, int, How, bool], list[Change]] = defaultdict(list)
    for made in changes.made:
        if made.value is None:
            raise _not_again(made.site, "it was no change of numbers, position by position")
        call = _call_in_forward(made, changes.timeline)
        groups[made.site, call, made.leaf, made.how, made.during is None].append(made)
    for (site, call, leaf, how, is_outside), group in groups.items():
        last = group[-1]
        if is_outside:
            assert last.value is not None
            yield site, _Again(call, leaf, how, last.value, last.before)
            continue
        try:
            laid = _laid(site, [(made.during, made.value) for made in group], changes, transcript)
            was = [(made.during, _before(made)) for made in group]
            before = None if how is How.SKIPPED else _laid(site, was, changes, transcript).value
        except TracekitError as error:
            raise _not_again(site, error.args[0]) from None
        yield site, _Again(call, leaf, how, laid, before)


def _laid(site: Site, values: list[Any], changes: Changes, transcript: Transcript) -> Laid:
    return lay_out(str(site), values, changes.timeline, transcript, is_flat=True)


def _before(made: Change) -> Tensor | None:
    return made.value if made.before is None else made.before


def _call_in_forward(made: Change, timeline: Timeline) -> int:
    """The how-manieth call of its module in the forward; calls are counted in a step."""
    if made.during is None:
        return made.call
    before = [each for each in timeline.passes[: made.during.place] if each.step == made.step]
    if not before:
        return made.call
    if made.call == len(before):
        return 0  # one call in each forward of the step
    raise _not_again(made.site, "it is not known in which call of a forward it was made")


def _changed(value: Any, again: _Again, one: Pass) -> Any:
    """`value`, with one of its tensors changed."""
    found = list(tensors(value))
    if again.leaf >= len(found):
        return value
    old = found[again.leaf]
    new = _with(old, again, one)
    return value if new is old else replace_tensor(value, old, new)


def _with(tensor: Tensor, again: _Again, one: Pass) -> Tensor:
    own = tensor if again.how is How.IN_PLACE else tensor.clone()
    if isinstance(again.laid, Tensor):
        return own.copy_(_as_before(own, again.laid, again.before))
    value, columns, _, axis = again.laid
    laid = by_rows(own, axis, one.rows, one.length)
    index = torch.tensor(columns, device=own.device)
    laid.index_copy_(1, index, _as_before(laid.index_select(1, index), value, again.before))
    return own


def _as_before(own: Tensor, after: Tensor, before: Tensor | None) -> Tensor:
    """`own`, changed as `before` was to `after`.

    To the same values where it is what `before` was, as far as can be told: a zero stays a zero,
    and no rounding error that a norm would make large. Elsewhere by the same difference.
    """
    after = _with_rows_of(own, after)
    if before is None:
        return after
    before = _with_rows_of(own, before)
    close = TOLERANCES.get(own.dtype, 0.0) * before.abs().amax()
    return torch.where((own - before).abs() <= close, after, own + (after - before))


def _with_rows_of(own: Tensor, recorded: Tensor) -> Tensor:
    recorded = recorded.to(own.device)
    if own.shape[0] < recorded.shape[0]:  # one for all rows
        return recorded[: own.shape[0]]
    return recorded.repeat_interleave(own.shape[0] // recorded.shape[0], 0)


def _not_again(site: Site, why: str) -> CacheError:
    return CacheError(
        f"this run can't be made again in one forward, as {site} was changed in it: {why}. Change "
        f"it with .at(positions), or compare with a run of your own."
    )
