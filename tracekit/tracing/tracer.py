"""The Tracer is the `with` context: it captures its body, runs the model, hands results back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast, final, overload

import torch

from tracekit.capture import (
    Block,
    caller_frame,
    capture,
    drop_machinery,
    show_own_lines,
    showing_own_lines,
)
from tracekit.core.settings import settings
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Planner, Tree
from tracekit.errors import CacheError, CaptureError, InputError, OutsideTraceError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.cache import Cache
from tracekit.tracing.call import TracedCall
from tracekit.tracing.called import Called, call_of
from tracekit.tracing.declared import Outcome, run_declared
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.graph import Graph, Log
from tracekit.tracing.inplace import InPlace
from tracekit.tracing.invoke import Barrier, Batch, Gathered, Invoke, gathered_of
from tracekit.tracing.named_cache import NamedCache, keep_of, record_named
from tracekit.tracing.planned import Plan, plan_of
from tracekit.tracing.quiet import asks_for_nothing
from tracekit.tracing.select import Selector
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.steps import Steps
from tracekit.tracing.unentered import warn_if_dropped
from tracekit.tracing.verified.report import EditReport
from tracekit.tracing.verified.run import Verifier, report_of
from tracekit.tracing.wanted import Names, wanted
from tracekit.tracing.ways import Lifted, Quiet, Way, abandon, without_own

T = TypeVar("T")


@final
class Tracer:
    """What `with model.trace(...) as tracer:` binds: what is of the run, and not of one module.

    The names are nnsight's, as are the forms of `with`.
    """

    def __init__(
        self,
        tree: Tree,
        call: TracedCall | Batch,
        grad: bool | None = None,
        edits: Sequence[Intervention] = (),
        verifier: Verifier | None = None,
    ) -> None:
        self._tree = tree
        self._verifier = verifier
        self._call = call  # a Batch: each input comes with an invoke
        self._grad = grad
        self._edits = edits
        self._block: Block | None = None
        self._way: Way | None = None  # while the block runs
        self._told = ""
        self._log = Log()  # of the run
        self._is_used = False
        self.planner: Planner | None = None

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not self._is_used and not is_ending():  # the names of this module may be gone then
            is_dry = self._tree.original is not None and not self._tree.gone
            warn_if_dropped("model.scan" if is_dry else "model.trace")

    # -- in the block ---------------------------------------------------------------------------

    @overload
    def cache(
        self,
        modules: Selector | None = None,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        *,
        names: None = None,
        include_grads: bool = False,
        clone: bool = False,
    ) -> Cache: ...
    @overload
    def cache(
        self,
        *,
        names: Names,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_grads: bool = False,
        clone: bool = False,
        pos_slice: PosSlice = None,
    ) -> NamedCache: ...
    def cache(
        self,
        modules: Selector | None = None,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        *,
        names: Names | None = None,
        include_grads: bool = False,
        clone: bool = False,
        pos_slice: PosSlice = None,
    ) -> Cache | NamedCache:
        """Record modules while the model runs, with hooks alone; the fast way to capture.

        `modules`: an Envoy, a path, a glob (`"transformer.h.*.mlp"`), a predicate of path and
        module, or a list of them; every module by default. `device`, `dtype` and `detach` are
        applied to each tensor as it is recorded; `device=None` leaves it where it is, and
        `dtype` leaves integers and booleans alone. `clone=True` copies tensors even where that
        is not needed to move them: for modules that work in place. `include_grads=True` adds the
        gradients of outputs: `.grad`, once a backward pass has run, in the block or after it.

        `names` instead of modules: activations by standard name (`"resid_post"`, every layer's;
        `("pattern", 3)`; a glob, a predicate of the name, a list), in a NamedCache; of these,
        `pos_slice` keeps positions alone.

        In the block of an invoke, its rows alone are recorded. Of a generation there is an entry
        for each step; `cache.sequence(path)` puts them together, and `cache.verify()` holds them
        against one forward over the final tokens, if the cache was made before the block edits.

        Raises UnknownPathError for a module that the model does not have, CacheError if the
        model has passed one, and, when the trace ends, NeverRanError for one that did not run.
        """
        execution = self._way.execution if self._way is not None else None
        if execution is None:
            raise CacheError("tracer.cache() belongs into the block of the trace.")
        mediator = current_mediator()
        if mediator in execution.mediators and mediator.answers is not None:
            return cast("Cache", mediator.recall("cache"))  # it was made ahead of the block
        invoke = None if isinstance(self._way, Gathered) else 0
        if names is not None:
            keep = keep_of(device, dtype, detach=detach, clone=clone)
            spots = wanted(self._tree, names, "names=")
            grads = include_grads
            return record_named(
                execution, self._tree, spots, keep, pos_slice, has_grads=grads, invoke=invoke
            )
        if pos_slice is not None:
            raise CacheError("pos_slice= is of activations by name: give names=, too.")
        if not (include_output or include_inputs or include_grads):
            raise CacheError("include_output=False and include_inputs=False record nothing.")
        keep = keep_of(device, dtype, detach=detach, clone=clone)
        return execution.record(
            modules, keep, include_inputs, include_output, include_grads, invoke
        )

    @property
    def result(self) -> Any:
        """What the traced call returned; blocks until it has. For generate, the tokens.

        In the block of an invoke, the rows of its input. Ask for it last: the run is over then.
        """
        return self._mediator("result").read(Site(self._tree.name, Slot.RESULT))

    def stop(self) -> None:
        """End the block and the run: nothing after this point is computed.

        With several invokes it ends its own block, and the run when no other goes on.
        """
        self._mediator("stop()").stop()

    @property
    def iter(self) -> Steps:
        """Steps of a generation: `for step in tracer.iter[2:5]:` is steps 2, 3 and 4.

        Index it with a step, a slice, or an ascending list; from 0, the prompt, or from the end,
        with -1, where that is certain (StepError elsewhere). An open loop ends with the run; one
        over steps that did not happen ends, too, and warns (ShortLoopWarning).
        """
        return Steps(lambda: self._mediator("iter"))

    def all(self) -> Steps:
        """Every step of the generation: the same as `tracer.iter[:]`."""
        return self.iter

    def next(self, steps: int = 1) -> None:
        """Go on to a later step: what is asked for afterwards is about that one.

        StepError, where it is asked about, if the run ended before.
        """
        mediator = self._mediator("next()")
        mediator.go_to_step(mediator.step + steps)

    def invoke(self, *args: Any, **kwargs: Any) -> Invoke:
        """`with tracer.invoke(input):` adds rows to one batch; its block sees these rows alone.

        For a trace that was opened without input. Takes what `trace` takes; inputs of different
        lengths are padded, such that each row is what it is alone. Without input the block sees
        all rows. Blocks run in the order in which they stand: at each value, an earlier block
        comes first. A block that reads a name that an earlier one binds waits for it.
        """
        gathered = gathered_of(self._way)
        return Invoke(gathered, gathered.add_rows(args, kwargs))

    def barrier(self, count: int) -> Barrier:
        """A function that `count` blocks call, each waiting for the others there.

        Names that an earlier block binds need none: whoever reads them waits. Behind a barrier a
        block sees what the others bound before it. NeverCameError if too few call it.
        """
        gathered_of(self._way)
        return Barrier(count)

    @property
    def graph(self) -> Graph:
        """What the blocks asked for so far, in order: a node for each request, with its line.

        It holds no value, and stays when the run is over.
        """
        return self._log.graph()

    @property
    def report(self) -> EditReport:
        """Of a trace with `verify=True`, once it has run: what its edits did, and whether it holds.

        It is there also where the block ended with an error, as far as the run went.
        """
        return report_of(self._verifier)

    @property
    def plan(self) -> Plan:
        """Behind the block of `with model.plan(...) as tracer:`, what the run will hold."""
        return plan_of(self.planner)

    def explain(self) -> str:
        """In which way the block ran, and why; its source and syntax tree if it was captured."""
        if not self._told:
            raise CacheError("there is nothing to explain before the block has begun.")
        return self._told + (f"\n\n{self._block.explain()}" if self._block is not None else "\n")

    def _mediator(self, name: str) -> Mediator:
        mediator = current_mediator()
        execution = self._way.execution if self._way is not None else None
        if mediator is None or execution is None or mediator not in execution.mediators:
            raise OutsideTraceError(
                f"tracer.{name} means something only in the block of its trace; bind what you "
                f"need there, as in `out = tracer.result`."
            )
        return mediator

    # -- without a block ------------------------------------------------------------------------

    @overload
    def run(self, function: Callable[..., T]) -> T: ...
    @overload
    def run(self, *, capture: Selector = (), edits: Iterable[Any] = ()) -> Outcome: ...
    @showing_own_lines
    def run(
        self,
        function: Callable[..., T] | None = None,
        *,
        capture: Selector = (),
        edits: Iterable[Any] = (),
    ) -> T | Outcome:
        """Run a function in the place of a block, and return what it returns.

        It is called as `function()`, or as `function(tracer)` if it requires an argument, and may
        do all that a block may; it needs no source. It returns None if it said `tracer.stop()`.

        Without a function: record the modules of `capture` (as `tracer.cache` takes them), make
        the `edits`, and return an Outcome, with `.result` and `.cache`. An edit is a pair of
        modules and what becomes of their `.hidden`: a function of it (which returns the new value,
        or None if it changed it in place), a tensor to write, or a number. NeverRanError if one
        was not made.
        """
        if self._way is not None or not isinstance(self._call, TracedCall):
            what = "this trace has one" if self._way is not None else "a trace of invokes needs one"
            raise InputError(f"tracer.run() takes the place of a block, and {what}.")
        self._is_used = True
        if function is None:
            return run_declared(self._tree, self._call, self._declared, capture, edits)
        if capture != () or edits != ():
            raise InputError("tracer.run() takes a function, or capture= and edits=, not both.")
        way = Called(call_of(function, self), self._execution())
        self._way, self._block, self._told = way, None, way.told
        try:
            failure = way.finish()
        finally:
            self._way = None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its frames refer to this one
        return way.value

    def _declared(self, call: TracedCall, edits: Sequence[Intervention]) -> Execution:
        return self._execution(None, call, edits)

    # -- the with statement ---------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        self._is_used = True
        self._way = self._way_from(caller_frame())
        self._told = self._way.told
        return self

    def _way_from(self, frame: FrameType) -> Way:
        """How the block of the `with` that `frame` enters runs."""
        self._block = None
        if not isinstance(self._call, TracedCall):
            start = partial(self._execution, None)
            return Gathered(self._tree, self._call, start, self)
        if not settings.lift_blocks:
            return InPlace(frame, self._execution, self._grad, "settings.lift_blocks is False.")
        try:
            block = capture(frame)
            if asks_for_nothing(block):
                way: Way = Quiet(self._execution())
            else:
                way = Lifted(block, frame, self, self._execution, self._tree)
        except CaptureError as error:
            return InPlace(frame, self._execution, self._grad, error.args[0])
        self._block = block
        return way

    def _execution(
        self,
        thread: int | None = None,
        call: TracedCall | None = None,
        edits: Sequence[Intervention] = (),
    ) -> Execution:
        own = self._call if isinstance(self._call, TracedCall) else None
        chosen = call or own
        assert chosen is not None
        every = [*self._edits, *edits]
        execution = Execution(self._tree, chosen, self._grad, every, thread, self._verifier)
        self._log = execution.log
        return execution

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # To a type checker, as to a reader, this `with` swallows nothing: what it binds is bound.
        way = self._way
        assert way is not None
        if error is not None and not way.is_own(error):
            self._way = None
            abandon(way, error)
            drop_machinery(error)
            return None
        handled = error.__context__ if error is not None else None  # what the user is handling
        del error, traceback
        try:
            failure = way.finish()
        except KeyboardInterrupt as interrupt:  # perhaps before its first line
            abandon(way, interrupt)
            raise
        finally:
            self._way = None
        if failure is None:
            return True  # pyright: ignore[reportReturnType] - it swallows the skip of the body
        # A bare raise goes on with the traceback as it stands, and does not add this frame: the
        # user sees own lines alone. The context was the skip of the body, which is no news.
        context = without_own(failure, handled, way)
        try:
            raise failure
        except BaseException as shown:
            show_own_lines(shown, context)
            raise
        finally:
            del failure, context, handled, way
