"""`tracer.iter[...]`: go through the steps of a generation, each when the model gets there."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, final

from tracekit.capture import warn_user
from tracekit.errors import ShortLoopWarning, StepError
from tracekit.interleave.mediator import Mediator


class _NoContext:
    """Says what to write instead of `with tracer.iter[...]:`, as nnsight once had it."""

    def __enter__(self) -> NoReturn:
        raise StepError(
            "steps are gone through by a loop: write `for step in tracer.iter[...]:` in the place "
            "of `with tracer.iter[...]:`."
        )

    def __exit__(self, *raised: object) -> None: ...


@final
class StepLoop(_NoContext, Iterator[int]):
    """The steps of one loop, each when the model gets there."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps = steps

    def __next__(self) -> int:
        return next(self._steps)


@final
class Steps(_NoContext):
    """Index it with a step, a slice or an ascending list of steps, and loop over that."""

    def __init__(self, mediator: Callable[[], Mediator]) -> None:
        self._mediator = mediator

    def __getitem__(self, key: int | slice | Sequence[int]) -> StepLoop:
        """The steps, in order; a loop without an end stops with the run, and what follows runs.

        Negative numbers count from the end, where it is certain how many steps there will be: in a
        forward pass (one), and in a generation that can't end early, as with
        `min_new_tokens=max_new_tokens`. StepError, with the reason, where it is not.
        """
        steps = steps_of(key, lambda: self._mediator().count_steps())
        is_open = isinstance(steps, itertools.count)
        return StepLoop(self._open(steps) if is_open else self._listed(steps))

    def __iter__(self) -> Iterator[int]:
        return self[:]

    def _listed(self, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if not self._mediator().wait_for_step(step):
                _warn_cut_short(f"step {step} was asked for")
                return
            yield step

    def _open(self, steps: Iterator[int]) -> Iterator[int]:
        first = step = next(steps)
        while self._mediator().wait_for_step(step):
            yield step
            step = next(steps)
        if step == first or self._mediator().steps_begun > step:
            _warn_cut_short(f"steps from {first} on were asked for")


def steps_of(key: Any, count: Callable[[], int]) -> Iterable[int]:
    """The steps that `tracer.iter[key]` goes through; an `itertools.count` if it is open.

    `count` tells how many the run will have; it is asked only where `key` counts from the end.
    """
    if not isinstance(key, slice):
        listed = [_number(each) for each in (key if isinstance(key, Iterable) else [key])]
        steps = [step if step >= 0 else _from_end(step, count()) for step in listed]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise StepError(f"steps come in ascending order, each once, not as {listed}.")
        return steps
    first, stride, stop = (
        given if given is None else _number(given) for given in (key.start, key.step, key.stop)
    )
    first, stride = first or 0, 1 if stride is None else stride
    if stride < 1:
        raise StepError(f"a stride of {stride} does not go on; leave it out, or give 1 or more.")
    if first < 0 or (stop is not None and stop < 0):
        return range(*slice(first, stop, stride).indices(count()))
    return itertools.count(first, stride) if stop is None else range(first, stop, stride)


def _number(given: object) -> int:
    try:
        return operator.index(given)  # pyright: ignore[reportArgumentType] - so it says
    except TypeError:
        text = f"steps are whole numbers, a slice or a list of them, not {given!r}."
        raise StepError(text) from None


def _from_end(step: int, count: int) -> int:
    if step < -count:
        had = "1 step" if count == 1 else f"{count} steps"
        raise StepError(f"there is no step {step}: the run has {had}; leave it out.")
    return step + count


def _warn_cut_short(what: str) -> None:
    warn_user(f"{what}, but the run ended before; the loop ends here.", ShortLoopWarning)
