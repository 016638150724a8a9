"""Lasting edits: blocks that are kept with a model and run in every run of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Generic, NoReturn, TypeVar, final, overload

from tracekit.capture import Block, LastingBody, Skip, caller_frame, capture, keep, skip_body
from tracekit.errors import CaptureError, OutsideTraceError, UnsupportedError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.execution import Intervention
from tracekit.tracing.rounds import in_each_step
from tracekit.tracing.steps import Steps
from tracekit.tracing.ways import HELPERS

M = TypeVar("M")
_WAY_OUT = "or put it into a function of the model, and give that: model.edit(function)"


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


@final
class Edits(Sequence[Edit]):
    """The lasting edits of a model, in the order in which they are made to each value."""

    def __init__(self, model: Any, edits: list[Edit]) -> None:
        self._model = model  # without its edits
        self._edits = edits

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...
    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        return self._edits[index]

    def __delitem__(self, index: int | slice) -> None:
        del self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits[:])

    def add(self, function: Callable[[Any], object]) -> Edit:
        """Make an edit of `function`, which is called with the model in every step of every run.

        A function, unlike a block, sees the names around it as they are when it runs.
        """
        self._edits.append(of_function(function, self._model))
        return self._edits[-1]

    def remove(self, edit: int | Edit) -> None:
        """Take an edit away, given itself or its index."""
        index = edit if isinstance(edit, int) else self._edits.index(edit)
        del self._edits[index]

    def clear(self) -> None:
        """Take all edits away."""
        self._edits.clear()

    def __repr__(self) -> str:
        shown = "".join(f"\n  [{index}] {edit!r}" for index, edit in enumerate(self._edits))
        return f"Edits({len(self)}){':' if self else ''}{shown}"


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
    return Edit(partial(function, model), source, filename, line)


def _once(run: Callable[[], object]) -> None:
    run()


@final
class Editing(Generic[M]):
    """The context of `with model.edit() as edited:`; its block becomes a lasting edit."""

    def __init__(self, model: M, edits: list[Edit], exchange: Callable[[object], object]) -> None:
        self._model = model
        self._edits = edits
        self._exchange = exchange
        self._frame: FrameType | None = None
        self._block: Block | None = None
        self._skip: Skip | None = None

    def __enter__(self) -> M:
        frame = caller_frame()
        try:
            block = capture(frame)
            if block.is_empty:
                raise CaptureError("an empty block edits nothing.")
            is_alone = _tracer_name(block) is None
            bound: Any = self._model if is_alone else (EditTracer(), self._model)
            self._skip = skip_body(block, frame, entered=bound)
        except CaptureError as error:
            raise CaptureError(f"{error.args[0]}; {_WAY_OUT}") from None
        self._block, self._frame = block, frame
        return bound

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # To a type checker, as to a reader, this `with` swallows nothing.
        skip, frame, block = self._skip, self._frame, self._block
        self._skip = self._frame = self._block = None
        assert skip is not None
        assert frame is not None
        assert block is not None
        skip.restore()
        if not skip.is_own(error):
            if error is not None:
                return None
            raise CaptureError(
                "the block ran in place, where its values do not exist: something (a debugger, a "
                "coverage tool) took the trace function away while tracekit kept it from running."
            )
        body = keep(block, frame, HELPERS, self._exchange)
        line = block.tree.body[0].lineno
        own_steps = goes_through_steps(block.tree.body, _tracer_name(block))
        self._edits.append(Edit(body, block.source, block.filename, line, own_steps))
        return True  # pyright: ignore[reportReturnType] - it swallows the skip of the body


def _tracer_name(block: Block) -> str | None:
    """The first name, if the `with` says `as (tracer, edited)`, as in nnsight."""
    target = block.tree.items[block.place.item].optional_vars
    if not isinstance(target, (ast.Tuple, ast.List)) or len(target.elts) != 2:
        return None
    return ast.unparse(target.elts[0])


def goes_through_steps(statements: Sequence[ast.stmt], tracer: str | None) -> bool:
    """Whether a block says for itself in which steps it edits, so that it runs once."""
    nodes = (node for statement in statements for node in ast.walk(statement))
    return any(_names_steps(node, tracer) for node in nodes if isinstance(node, ast.Attribute))


def _names_steps(node: ast.Attribute, tracer: str | None) -> bool:
    is_of_tracer = isinstance(node.value, ast.Name) and node.value.id == tracer
    return node.attr == "next" or (is_of_tracer and node.attr in {"iter", "all"})


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
