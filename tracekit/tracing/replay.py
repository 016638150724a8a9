"""Make the changes of a run again, at the same positions, in one forward over all its tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from tracekit.core.nest import map_leaves
from tracekit.core.site import Site
from tracekit.errors import CacheError, TracekitError
from tracekit.tracing.changes import Change, Changes, How
from tracekit.tracing.sequence import Laid, lay_out
from tracekit.tracing.timeline import Pass, Timeline, Transcript


class _Again(NamedTuple):
    """A change to make again: of what call in a forward, which tensor, how and with what."""

    call: int
    leaf: int
    how: How
    laid: Laid | Tensor  # a Tensor: all of a value that no forward of the decoder gave


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
        if is_outside:
            assert group[-1].value is not None
            yield site, _Again(call, leaf, how, group[-1].value)
            continue
        tensors = [(made.during, made.value) for made in group]
        try:
            laid = lay_out(str(site), tensors, changes.timeline, transcript, is_flat=True)  # pyright: ignore[reportArgumentType] - neither is None here
        except TracekitError as error:
            raise _not_again(site, error.args[0]) from None
        yield site, _Again(call, leaf, how, laid)


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
    following = iter(range(10**9))
    found: list[Tensor] = []

    def look(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and next(following) == again.leaf:
            found.append(leaf)
        return leaf

    map_leaves(look, value)
    if not found:
        return value
    new = _with(found[0], again, one)
    return (
        value
        if new is found[0]
        else map_leaves(lambda leaf: new if leaf is found[0] else leaf, value)
    )


def _with(tensor: Tensor, again: _Again, one: Pass) -> Tensor:
    own = tensor if again.how is How.IN_PLACE else tensor.clone()
    if isinstance(again.laid, Tensor):
        added = again.laid.to(own.device)
        if added.shape[0] != own.shape[0]:
            added = added.repeat_interleave(own.shape[0] // added.shape[0], 0)
        return own.copy_(added) if again.how is How.SKIPPED else own.add_(added)
    value, columns, axis = again.laid
    laid = own.unflatten(0, (one.rows, one.length)) if axis == 0 else own.movedim(axis, 1)
    added, index = value.to(own.device), torch.tensor(columns, device=own.device)
    if laid.shape[0] == 1 < added.shape[0]:  # one for all rows
        added = added[:1]
    if again.how is How.SKIPPED:
        laid.index_copy_(1, index, added)
    else:
        laid.index_add_(1, index, added)
    return own


def _not_again(site: Site, why: str) -> CacheError:
    return CacheError(
        f"this run can't be made again in one forward, as {site} was changed in it: {why}. Change "
        f"it with .at(positions), or compare with a run of your own."
    )
