"""`tracer.invoke(...)`: blocks with rows of their own, gathered, and then run beside one batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Protocol, final

from tracekit.capture import Block, Family, Skip, caller_frame, capture, skip_body
from tracekit.core.tree import Tree
from tracekit.errors import CaptureError, InputError, OutsideTraceError
from tracekit.interleave.duties import Rows
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.layouts import layouts_of
from tracekit.tracing.rows import AllRows, Copies, InvokeRows
from tracekit.tracing.unentered import warn_if_dropped
from tracekit.tracing.unison import outlooks
from tracekit.tracing.ways import HELPERS, Way

_WAY_OUT = (
    "the blocks of several invokes run together, so each must be lifted out of its place: put them "
    "into a function in a file, or trace the inputs one by one"
)


class Batch(Protocol):
    """The inputs of several invokes, and the call that runs them as one (models/batching.py)."""

    @property
    def kind(self) -> Hashable:
        """Tells apart calls that take different ways through the model."""
        ...

    @property
    def is_generation(self) -> bool:
        """Whether the call is no forward pass, but a loop of them with a result of its own."""
        ...

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """One more input, behind the others; how many rows it has."""
        ...

    def call(self) -> TracedCall:
        """Runs the model on all inputs."""
        ...

    def call_with(self, rows: int) -> Callable[[Tree], object]:
        """Runs a forward pass of the model of a Tree on one of the rows, repeated."""
        ...


@final
class Gathered(Way):
    """The blocks of several invokes, in one run; the block around them runs where it stands."""

    told = "The blocks of the invokes were lifted out of their places, and ran beside one run."

    def __init__(
        self,
        tree: Tree,
        batch: Batch,
        start: Callable[[TracedCall], Execution],
        tracer: object,
    ) -> None:
        self._tree = tree
        self._tracer = tracer
        self._batch = batch
        self._family = Family()
        self._blocks: list[Block] = []
        self._spans: list[tuple[int, int] | None] = []  # of each block; None: all rows
        self._size = 0
        self.is_open = True
        self.execution = start(TracedCall(self._run, self._count_steps))

    def add_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """Put one more input into the batch: its rows, or None for all rows if it is no input."""
        if not args and not kwargs:
            return None
        start = self._size
        self._size += self._batch.add(args, kwargs)
        return start, self._size

    def add_block(self, block: Block, frame: FrameType, span: tuple[int, int] | None) -> None:
        """Run one more block, for the rows of `span`."""
        self._blocks.append(block)
        self._family.add(block.member(frame, _HELPERS))
        self._spans.append(span)

    def abandon(self, error: BaseException) -> None:
        self.is_open = False
        assert self.execution is not None
        self.execution.abandon()

    def finish(self) -> BaseException | None:
        self.is_open = False
        assert self.execution is not None
        if not self._size:
            self.execution.abandon()
            return InputError(
                "this trace has no input: give one, as in model.trace(input), or open a "
                "`with tracer.invoke(input):` for each input in its block."
            )
        interventions = self._interventions()
        self._family.begin()
        try:
            return self.execution.run(interventions)
        finally:
            self._family.hand_back()

    def _run(self, follower: Follower | None) -> Any:
        return self._batch.call().make(follower)

    def _count_steps(self) -> int:
        return self._batch.call().count_steps()

    def _interventions(self) -> list[Intervention]:
        members = self._family.members
        known = outlooks(self._blocks, members, self._tracer, self._tree)
        return [
            Intervention(
                member,
                own,
                member,
                forecast=outlook.forecast,
                asked=outlook.asked,
                file=block.filename,
            )
            for block, member, own, outlook in zip(
                self._blocks, members, self._rows(), known, strict=True
            )
        ]

    def _rows(self) -> list[Rows | None]:
        """Of each block; None for the only block, if it sees all."""
        everything = (0, self._size)
        spans = [None if span == everything else span for span in self._spans]
        if spans == [None]:
            return [None]
        copies = Copies()
        if not any(spans):
            return [AllRows(copies) for _ in spans]
        layouts = layouts_of(self._tree, self._batch.call_with, self._batch.kind)
        learn = partial(layouts.learn, self._tree, self._batch.call_with)
        how = (self._size, copies, learn, self._batch.is_generation)
        return [InvokeRows(layouts, *span, *how) if span else AllRows(copies) for span in spans]


@final
class Invoke:
    """What `with tracer.invoke(input):` enters: its block sees the rows of `input` alone."""

    def __init__(self, gathered: Gathered, span: tuple[int, int] | None) -> None:
        self._gathered = gathered
        self._span = span
        self._skip: Skip | None = None
        self._frame: FrameType | None = None
        self._is_used = False

    def __del__(self) -> None:
        if not self._is_used:
            warn_if_dropped("tracer.invoke")

    @property
    def rows(self) -> range | None:
        """The rows of the batch that the block sees; None for all of them."""
        return None if self._span is None else range(*self._span)

    def __enter__(self) -> Invoke:
        self._is_used = True
        frame = caller_frame()
        try:
            self._block = capture(frame)
        except CaptureError as error:
            text = str(error).removesuffix(f" [{error.slug}]")
            raise CaptureError(f"{text}; {_WAY_OUT}") from None
        if not self._block.is_empty:
            self._skip = skip_body(self._block, frame, entered=self)
            self._frame = frame
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # To a type checker, as to a reader, this `with` swallows nothing: what it binds is bound.
        skip, self._skip = self._skip, None
        frame, self._frame = self._frame, None
        if skip is None:
            return None
        skip.restore()
        if not skip.is_own(error):
            return None
        assert frame is not None
        self._gathered.add_block(self._block, frame, self._span)
        return True  # pyright: ignore[reportReturnType] - it swallows the skip of the body


@final
class Barrier:
    """A place where blocks wait for each other: each calls it, and goes on when `count` have.

    Behind it, each sees the names that the others have bound.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise InputError(f"a barrier is for 1 block or more, not {count}.")
        self._count = count
        self._arrived = 0

    def __call__(self) -> None:
        """Wait for the other blocks; the barrier can be used again after it."""
        mediator = current_mediator()
        if mediator is None:
            raise OutsideTraceError("a barrier is called in the blocks of tracer.invoke(...).")
        self._arrived += 1
        needed = -(-self._arrived // self._count) * self._count
        mediator.sleep(lambda: self._arrived >= needed, f"{self._count} blocks to call a barrier")
        if mediator.scope is not None:
            mediator.scope.meet()


def gathered_of(way: Way | None) -> Gathered:
    """The way as one that takes invokes; OutsideTraceError if it does not."""
    if isinstance(way, Gathered) and way.is_open:
        return way
    if isinstance(way, Gathered):
        raise OutsideTraceError(
            "tracer.invoke() and tracer.barrier() belong into the block of the trace itself, not "
            "into the block of another invoke."
        )
    raise OutsideTraceError(
        "this trace has its input already, and a block: open it without input, as in "
        "`with model.trace() as tracer:`, and give each input to a `with tracer.invoke(input):`."
    )


def _wait_for_sibling(name: str) -> bool:
    mediator = current_mediator()
    if mediator is not None and mediator.scope is not None:
        mediator.scope.wait_for(name, mediator.sleep)
    return True


_HELPERS = {**HELPERS, "wait": _wait_for_sibling}
