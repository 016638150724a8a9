"""Run a model with a cache of its activations, or with functions at them, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

from torch import Tensor

from tracekit.core.keep import Keep
from tracekit.core.nest import describe
from tracekit.core.tree import Tree
from tracekit.errors import GradientError, NeverRanError
from tracekit.models.starting import Begun
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.cut import StopAt
from tracekit.tracing.declared import run_to_end
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.hooked import Hooked, Pairs, hooked
from tracekit.tracing.named_cache import NamedCache, record_named
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.wanted import Names, wanted


class Start(Protocol):
    """Makes the run of a call, with a model's edits and hooks, and more functions."""

    def __call__(
        self, call: TracedCall, functions: Sequence[Hooked | StopAt] = ()
    ) -> Execution: ...


@final
@dataclass(frozen=True)
class Caching:
    """What is recorded, and how."""

    names_filter: Names | None
    keep: Keep
    remove_batch_dim: bool = False
    pos_slice: PosSlice = None
    stop_at_layer: int | None = None
    incl_bwd: bool | Callable[[Any], Any] = False
    is_plain: bool = False  # nothing edits what is recorded
    begun: Begun | None = None  # in front of a layer


def run_with_cache(
    start: Start, tree: Tree, call: TracedCall, caching: Caching
) -> tuple[Any, NamedCache]:
    """What `call` returns, and a cache of the activations of it."""
    tree.refresh_if_changed()
    names = caching.names_filter
    spots = None if names is None else wanted(tree, names)
    stop = None if caching.stop_at_layer is None else StopAt(tree, caching.stop_at_layer)
    if stop is not None:
        stop.check(spots or [])
    if caching.begun is not None:
        caching.begun.check((), stop)
        spots = caching.begun.left(wanted(tree, None) if spots is None else spots)
        tree = caching.begun.tree
    results: list[Any] = []
    execution = start(_kept(call, results), () if stop is None else (stop,))
    cache = record_named(
        execution,
        tree,
        spots,
        caching.keep,
        caching.pos_slice,
        has_grads=bool(caching.incl_bwd),
        is_plain=caching.is_plain,
    )
    run_to_end(execution)
    result = results.pop() if stop is None else stop.residual
    if caching.incl_bwd:
        _scalar(result, caching.incl_bwd).backward()
    cache = cache.remove_batch_dim() if caching.remove_batch_dim else cache
    return returned(result), cache


def run_with_hooks(
    start: Start, call: TracedCall, functions: Sequence[Hooked], stop: StopAt | None = None
) -> Any:
    """What `call` returns, with the functions called; the residual stream where it is stopped."""
    results: list[Any] = []
    run_to_end(start(_kept(call, results), functions if stop is None else [*functions, stop]))
    return returned(results.pop()) if stop is None else stop.residual


def returned(result: Any) -> Any:
    """The logits, or all of what a model gives where it has none."""
    logits = getattr(result, "logits", None)
    return result if logits is None else logits


def _kept(call: TracedCall, results: list[Any]) -> TracedCall:
    def kept(follower: Follower | None) -> Any:
        results.append(call.make(follower))
        return results[0]

    return replace(call, make=kept)


def _scalar(result: Any, incl_bwd: Any) -> Tensor:
    found = incl_bwd(result) if callable(incl_bwd) else getattr(result, "loss", result)
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise GradientError(
            f"incl_bwd=True runs backward from a scalar, and the model gave "
            f"{describe(found)}: give labels=, or a function of the output that returns a scalar, "
            f"as in incl_bwd=lambda out: out.logits[0, -1, 7]."
        )
    if not found.requires_grad:
        raise GradientError(
            "incl_bwd= needs gradients, and the model computed without: leave torch.no_grad() out."
        )
    return found


# -- functions at activations -------------------------------------------------------------------


def both(tree: Tree, fwd_hooks: Pairs, bwd_hooks: Pairs) -> list[Hooked]:
    """The functions of a run, forward and backward."""
    return [*hooked(tree, fwd_hooks, "fwd"), *hooked(tree, bwd_hooks, "bwd")]


def calling(functions: Sequence[Hooked | StopAt]) -> Intervention:
    """What lets functions be called in a run."""
    return Intervention(_nothing, functions=tuple(functions))


def _nothing() -> None:
    """In the place of a block."""


@final
class Placed:
    """The context of `with model.hooks(...)`; its functions are a model's as long as it is open."""

    def __init__(self, there: list[Hooked], functions: Sequence[Hooked]) -> None:
        self._there = there
        self._functions = functions
        for each in functions:
            each.is_scoped = True

    def __enter__(self) -> None:
        self._there += self._functions

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for each in self._functions:
            each.remove()
        idle = [each for each in self._functions if not each.has_run]
        if kind is None and idle:
            raise NeverRanError(
                f"the hook at {idle[0].spots[0].spelled} was never called: the model did not run "
                f"in the block of this `with`, or ran as its torch module, without tracekit."
            )
