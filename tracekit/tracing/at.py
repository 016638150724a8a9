"""Edit what a module gives at chosen positions of the sequence, in whatever forward they come."""

# The unit of such an edit is the token, not the step: each is edited once where keys and values are
# kept, and in every forward that goes over it where they are not, so that the numbers are the same.

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor

from tracekit.capture import showing_own_lines
from tracekit.core.nest import describe, replace_tensor
from tracekit.core.site import Site
from tracekit.errors import InputError, MisfitError, NeverRanError, UnsupportedError
from tracekit.interleave.duties import Span
from tracekit.tracing.positions import Chosen, Positions
from tracekit.tracing.timeline import PADDING, Pass, Timeline, axis_of, by_rows, tensor_of

if TYPE_CHECKING:
    from tracekit.interleave.mediator import Mediator

# Takes the value of all positions of a forward, and what lays out a tensor that is written at the
# chosen ones, which has as many axes as is said, for all of them.
Change = Callable[[Tensor, Callable[[Tensor, int], Tensor]], Any]


@final
class Spot:
    """A value of a module of which positions are to be chosen: `module.output.at(...)`."""

    def __init__(self, find: Callable[[], tuple[Mediator, Site]], site: Site) -> None:
        self._find = find
        self._site = site

    def at(self, positions: Positions, *, flat: bool = False) -> At:
        """The value at `positions` of the sequence: `"prompt"`, `"generated"`, `"all"`, a number,
        a slice or a list of numbers, which count each row's own tokens from 0; negative ones count
        back from the end of the prompt. `flat=True` says of a value with rows and positions in one
        axis (a router's) that they are in it row by row."""
        return At(self._find, self._site, Chosen(positions), flat)


@final
class At:
    """What a module gives at chosen positions, to be edited: `[:] += v`, `[:] = v`, `.edit(f)`.

    The edit holds for the whole run, from where it is written on: make it before the model gets to
    the module. A value that is written is a number, or a tensor that fits `[rows, positions, ...]`,
    with one position or as many as are chosen.
    """

    def __init__(
        self, find: Callable[[], tuple[Mediator, Site]], site: Site, chosen: Chosen, is_flat: bool
    ) -> None:
        self._find = find
        self._site = site
        self._chosen = chosen
        self._is_flat = is_flat

    @showing_own_lines
    def edit(self, function: Callable[[Tensor], Tensor | None]) -> None:
        """Let the model go on with `function(value)` at the chosen positions.

        `value` is that of all positions of a forward, `[rows, positions, ...]`, of which what is
        not chosen stays as it is: the function has to take each token for itself. It returns the
        new value, or None if it changed it in place.
        """
        if not callable(function):
            raise InputError(f".edit() takes a function of the value, not {describe(function)}.")
        self._make(lambda value, _: function(value))

    def __getitem__(self, index: Any) -> Part:
        return Part(self, _features(index))

    @showing_own_lines
    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Part):  # `at[:] += v` ends so, with its edit made
            return
        self._operate(_features(index), lambda _, new: new, value)

    def change(self, change: Callable[[Any], Any] | Tensor | float) -> None:
        """Make the edit that a function, a tensor or a number says."""
        if callable(change) and not isinstance(change, Tensor):
            self.edit(change)
        else:
            self[:] = change

    def _operate(self, features: tuple[Any, ...], operation: Any, operand: Any) -> None:
        if not isinstance(operand, (Tensor, int, float)):
            raise InputError(
                f"what is written at positions is a tensor or a number, not {describe(operand)}."
            )
        if isinstance(operand, Tensor):
            operand = operand.clone()  # the edit is made later, and with what was written
        self._make(partial(_operated, features, operation, operand))

    def _make(self, change: Change) -> None:
        mediator, site = self._find()
        mediator.edit_at_positions(PositionEdit(site, self._chosen, change, self._is_flat))

    def __repr__(self) -> str:
        return f"{self._site}.at({self._chosen!r})"


@final
class Part:
    """Some features of what stands at chosen positions; operations in place are edits of it."""

    def __init__(self, at: At, features: tuple[Any, ...]) -> None:
        self._at = at
        self._features = features

    @showing_own_lines
    def __iadd__(self, other: Any) -> Part:
        return self._operate(operator.add, other)

    @showing_own_lines
    def __isub__(self, other: Any) -> Part:
        return self._operate(operator.sub, other)

    @showing_own_lines
    def __imul__(self, other: Any) -> Part:
        return self._operate(operator.mul, other)

    @showing_own_lines
    def __itruediv__(self, other: Any) -> Part:
        return self._operate(operator.truediv, other)

    def _operate(self, operation: Any, other: Any) -> Part:
        self._at._operate(self._features, operation, other)  # pyright: ignore[reportPrivateUsage] - same file
        return self


@final
class PositionEdit:
    """An edit of `site` at the `chosen` positions; what a run places, and a replay places again."""

    def __init__(self, site: Site, chosen: Chosen, change: Change, is_flat: bool = False) -> None:
        self._is_flat = is_flat
        self.site = site
        self.chosen = chosen
        self.span: Span | None = None  # of the rows of one block
        self.line = ""
        self.has_fired = False
        self.is_lasting = False  # it is made in every run, also where nothing of what is chosen is
        self._change = change

    def apply_now(self, timeline: Timeline, value: Any) -> Any:
        """`value`, of a forward that runs now, with the edit made."""
        one = timeline.current
        if one is None:
            raise UnsupportedError(
                f"{self.site}.at(...) ({self.line}): it ran outside of the decoder's forwards (an "
                f"encoder, for one), or what calls the model is none of transformers' ways; edit "
                f"its .output."
            )
        if timeline.is_beginning:
            self._check_beginning()
        return self.apply(value, one, timeline) if one.is_main else value

    def _check_beginning(self) -> None:
        if self.chosen.counts_back:
            raise UnsupportedError(
                f"{self.site}.at({self.chosen!r}) ({self.line}) counts from the end of the prompt, "
                f"which is not known when its beginning is read for a prefix: count from 0."
            )
        self.has_fired = True  # or what is chosen comes behind the prefix

    def apply(self, value: Any, one: Pass, timeline: Timeline) -> Any:
        """`value`, that a module gave or was given in the forward `one`, with the edit made."""
        tensor = tensor_of(self.site.slot, value)
        if tensor is None:
            raise MisfitError(f"{self.site} is {describe(value)}, with no tensor.")
        axis, count = axis_of(self.site, tensor, one)
        if axis == 0 and not self._is_flat:
            raise UnsupportedError(
                f"{self.site}.at(...) ({self.line}): {describe(tensor)} has rows and positions in "
                f"one axis, in an order that is not known: experts sort tokens, routers do not. If "
                f"it is row by row, write .at(..., flat=True)."
            )
        places = self._places(one, count, timeline)
        mask = places != PADDING
        if not bool(mask.any()):
            return value
        self.has_fired = True
        laid = by_rows(tensor, axis, one.rows, count)
        if laid.shape[0] < one.rows:  # one value for all rows, which stays so if it can
            is_one = bool((places == places[:1]).all())
            places, mask = (places[:1], mask[:1]) if is_one else (places, mask)
            laid = laid if is_one else laid.expand(one.rows, *laid.shape[1:])
        new = self._changed_rows(laid, places, one.rows)
        mask = mask.to(laid.device).reshape(*mask.shape, *[1] * (laid.dim() - 2))
        new = torch.where(mask, new, laid)
        new = new.flatten(0, 1) if axis == 0 else new.movedim(1, axis)
        return replace_tensor(value, tensor, new)

    def _places(self, one: Pass, count: int, timeline: Timeline) -> Tensor:
        """`[rows, count]`: of what positions of a forward, the last so many, are chosen."""
        prompt = timeline.first_generated(one)
        own = timeline.own_positions(one)[:, one.length - count :]
        own_prompt = timeline.own_prompt(prompt, one.rows)
        places = self.chosen.places(own, one.stop - count, prompt, own_prompt)
        if not (self.is_lasting and timeline.is_behind_prefix):  # which was read with it, too
            places[:, : max(0, timeline.untouched - (one.stop - count))] = PADDING
        if self.span is None:
            return places
        own, found = self.span.of(one.rows), torch.full_like(places, PADDING)
        found[own] = places[own]
        return found

    def _changed_rows(self, value: Tensor, places: Tensor, rows: int) -> Tensor:
        """`value` with the edit made of the rows of its block."""
        if self.span is None or value.shape[0] != rows:
            return self._changed(value, places)
        own, new = self.span.of(rows), value.clone()
        new[own] = self._changed(value[own], places[own])
        return new

    def _changed(self, value: Tensor, places: Tensor) -> Tensor:
        own = value.clone()
        try:
            new = self._change(own, partial(_spread, own, places, self.chosen.count))
        except MisfitError as error:
            where = f"{self.site} at {self.chosen!r} ({self.line})"
            raise MisfitError(f"{where}: {error.args[0]}") from None
        new = own if new is None else new
        if not isinstance(new, Tensor) or new.shape != value.shape or new.dtype != value.dtype:
            raise MisfitError(
                f"{self.site} at {self.chosen!r} was {describe(value)}, and the edit ({self.line}) "
                f"made {describe(new)} of it: it has to keep shape and dtype."
            )
        return new

    def check(self) -> None:
        """NeverRanError if no forward went over what was chosen."""
        if not self.has_fired and not self.is_lasting:
            raise NeverRanError(
                f"the edit of {self.site} at {self.chosen!r} ({self.line}) was never made: no "
                f"forward of the module went over these positions. The last new token is never run."
            )


def _operated(
    features: Any,
    operation: Any,
    operand: Any,
    value: Tensor,
    spread: Callable[[Tensor, int], Tensor],
) -> Tensor:
    index = (..., *features)
    try:
        part = value[index]
        if isinstance(operand, Tensor):
            operand = spread(operand.to(value.device), part.dim())
        value[index] = operation(part, operand)
    except (RuntimeError, IndexError) as error:
        raise MisfitError(
            f"{describe(operand)} can't be written at positions of {describe(value)}: {error}"
        ) from None
    return value


def _spread(value: Tensor, places: Tensor, count: int | None, written: Tensor, dim: int) -> Tensor:
    """`written` at the chosen positions, as it is to be at all positions of a forward.

    Beside a value with `dim` axes its last axes are those of the value, as everywhere in torch.
    """
    rows = value.shape[0]
    if written.dim() == dim - 1:
        if 1 < written.shape[0] == rows:
            raise MisfitError(
                f"{describe(written)} may have a value for each of {rows} rows, or of {rows} "
                f"positions: write value[:, None] or value[None]."
            )
        written = written[None]
    if written.dim() < dim or written.shape[1] == 1:
        return written
    given = written.shape[1]
    if given != count and (count is not None or bool((places >= given).any())):
        wanted = f"{count} positions" if count is not None else "more positions than that"
        raise MisfitError(
            f"{describe(written)} was written at {wanted}: axis 1 has to be as many, or 1."
        )
    place = places.clamp(min=0).to(written.device)
    own = torch.arange(rows, device=written.device)[:, None]
    return written.expand(rows, *written.shape[1:])[own, place]


def _features(index: object) -> tuple[Any, ...]:
    """What of each token's value is meant by `at[:, :, 3]` or `at[..., 3]`."""
    parts: tuple[Any, ...] = cast("Any", index) if isinstance(index, tuple) else (index,)
    if len(parts) == 0 or parts == (slice(None),) or parts == (...,):
        return ()
    if parts[0] is ...:
        return tuple(parts[1:])
    if len(parts) > 2 and parts[:2] == (slice(None), slice(None)):
        return tuple(parts[2:])
    raise InputError(
        f"positions are chosen by .at(), so all rows and positions of it are edited: write "
        f".at(...)[:], or [..., {parts[-1]!r}] for some features."
    )
