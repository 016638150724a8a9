"""One lasting edit: a block or a function that runs in every run of its model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, final

from tracekit.capture import LastingBody
from tracekit.errors import OutsideTraceError, UnsupportedError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.execution import Intervention
from tracekit.tracing.gradients import with_methods_of_blocks
from tracekit.tracing.rounds import in_each_step
from tracekit.tracing.steps import Steps


@final
class Edit:
    """One lasting edit: a block, with the names it uses as they were, or a function."""

    def __init__(
        self,
        run: Callable[[], object],
        source: str,
        filename: str,
        line: int,
        goes_through_steps: bool = False,
    ) -> None:
        self._run = run
        self.source = source
        self.filename = filename
        self.line = line
        self.goes_through_steps = goes_through_steps

    @property
    def names(self) -> Mapping[str, object] | None:
        """What the block uses, by name, as it was when the edit was made; None for a function."""
        return self._run.names if isinstance(self._run, LastingBody) else None

    def intervention(self) -> Intervention:
        """What runs beside the model."""
        if self.goes_through_steps:
            return Intervention(partial(_once, self._run))
        block = partial(_once, self._run)
        where = f"the edit at {self.filename}:{self.line}"
        return Intervention(partial(in_each_step, block, where), has_rounds=True)

    def __repr__(self) -> str:
        first, *more = self.source.strip().splitlines() or [""]
        return f"Edit({self.filename}:{self.line}: {first}{' …' if more else ''})"


def of_function(function: Callable[[Any], object], model: Any) -> Edit:
    """The edit that calls `function` with `model`."""
    if not callable(function):
        raise UnsupportedError(
            f"an edit is a function of the model, or the block of `with model.edit() as edited:`, "
            f"not {type(function).__name__}."
        )
    code = getattr(inspect.unwrap(function), "__code__", None)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = f"{getattr(function, '__name__', function)!s}\n"
    filename = code.co_filename if code is not None else "<function>"
    line = code.co_firstlineno if code is not None else 0
    return Edit(partial(with_methods_of_blocks, function, model), source, filename, line)


def _once(run: Callable[[], object]) -> None:
    run()


@final
class EditTracer:
    """The tracer of an edit, for the edits of some steps: `with model.edit() as (tracer, edited)`.

    A block that loops over `tracer.iter[...]` runs once in each run, and goes through the steps
    itself; any other begins anew in each step.
    """

    @property
    def iter(self) -> Steps:
        """Steps of a generation: `for step in tracer.iter[2:5]:` is steps 2, 3 and 4."""
        return Steps(_mediator)

    def all(self) -> Steps:
        """Every step of the generation: the same as `tracer.iter[:]`."""
        return self.iter

    def next(self, steps: int = 1) -> None:
        """Go on to a later step: what is asked for afterwards is about that one."""
        mediator = _mediator()
        mediator.go_to_step(mediator.step + steps)

    @property
    def result(self) -> NoReturn:
        """Not of an edit: what a run returns belongs to who runs it."""
        raise _not_of_an_edit("result", "read it in the trace of the edited model")

    def stop(self) -> NoReturn:
        """Not of an edit: it would leave every run of the model without a result."""
        raise _not_of_an_edit("stop()", "stop in the trace of the edited model")

    def cache(self, *args: object, **kwargs: object) -> NoReturn:
        """Not of an edit: nobody would see the cache."""
        raise _not_of_an_edit("cache()", "make it in the trace of the edited model")


def _not_of_an_edit(name: str, cure: str) -> UnsupportedError:
    return UnsupportedError(f"tracer.{name} has no meaning in a lasting edit; {cure}.")


def _mediator() -> Mediator:
    mediator = current_mediator()
    if mediator is None:
        raise OutsideTraceError(
            "the tracer of an edit means something only in the block of the edit."
        )
    return mediator
