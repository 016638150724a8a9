"""A run said in data: what to capture and what to edit, with no block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor

from tracekit.core.keep import Keep
from tracekit.core.nest import describe
from tracekit.core.tree import Tree
from tracekit.errors import InputError, NeverRanError
from tracekit.tracing.at import At
from tracekit.tracing.cache import Cache, empty_cache
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.rounds import in_each_step
from tracekit.tracing.select import Selector, select
from tracekit.tracing.touches import Author, of_code

# What becomes of a hidden state: the value that a function returns (None: it changed it in place),
# a tensor in its place, or a number everywhere in it.
Change: TypeAlias = "Callable[[Any], Any] | Tensor | float"


@final
@dataclass(frozen=True)
class Outcome:
    """What a declared run gives: what the call returned, and the cache of what was captured.

    The cache holds outputs, detached and on the CPU, as `tracer.cache()` does.
    """

    result: Any
    cache: Cache

    def __repr__(self) -> str:
        return f"Outcome(result={describe(self.result)}, cache={self.cache!r})"


@final
class DeclaredEdit:
    """One `(modules, change)`: the change is made to the `.hidden` of each, in each step.

    Or one `(module.output.at(positions), change)`: it is made to these positions.
    """

    def __init__(self, tree: Tree, edit: object) -> None:
        modules, self._change = _pair(edit)
        self._at = modules if isinstance(modules, At) else None
        nothing: tuple[dict[str, Any], set[str]] = {}, set()
        found, named = nothing if isinstance(modules, At) else select(tree, modules)
        self._modules = modules
        self._paths = {path: path in named for path in found}
        self._envoys = [Envoy(tree, path) for path in found]
        self._has_fired = False

    def interventions(self) -> list[Intervention]:
        """What runs beside the model, one for each module: they need not be in its order."""
        if self._at is not None:
            return [Intervention(partial(self._at.change, self._change))]
        author = self._author()
        return [
            Intervention(
                partial(in_each_step, partial(self._run, envoy), f"the edit of {envoy.path}"),
                has_rounds=True,
                author=author,
            )
            for envoy in self._envoys
        ]

    def _author(self) -> Author:
        paths = [envoy.path for envoy in self._envoys]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        what = f"the edit of {paths[0]}{more}" if paths else "an edit"
        return of_code("function", what, self._change, len(paths))

    def check(self) -> None:
        """NeverRanError if it was not made at all; of positions, the run tells that itself."""
        if not self._has_fired and self._at is None:
            raise NeverRanError(
                f"the edit of {self._modules!r} was not made: none of its modules ran."
            )

    def _run(self, envoy: Envoy) -> None:
        try:
            value = envoy.hidden
        except NeverRanError:
            if self._paths[envoy.path]:
                raise
            return  # one of several that a glob or a predicate found; another may run
        self._has_fired = True
        if isinstance(self._change, Tensor):
            envoy.hidden = self._change
        elif callable(self._change):
            changed = self._change(value)
            if changed is not None:
                envoy.hidden = changed
        else:
            envoy.hidden = torch.full_like(value, self._change)


def run_declared(
    tree: Tree,
    call: TracedCall,
    start: Callable[[TracedCall, Sequence[Intervention]], Execution],
    capture: Selector,
    edits: Iterable[object],
) -> Outcome:
    """Run `call` with the edits made, and the modules of `capture` recorded.

    `start` makes the Execution of a call and of the edits beside it. Raises UnknownPathError, with
    near matches, for unknown modules, before anything runs.
    """
    made = [DeclaredEdit(tree, edit) for edit in edits]
    results: list[Any] = []

    def kept(follower: Follower | None) -> Any:
        results[:] = [call.make(follower)]  # a run that is verified makes several
        return results[0]

    interventions = [each for edit in made for each in edit.interventions()]
    execution = start(replace(call, make=kept), interventions)
    if isinstance(capture, tuple) and not capture:
        cache = empty_cache()
    else:
        keep = Keep(torch.device("cpu"), None, detach=True, clone=False)
        cache = execution.record(capture, keep, inputs=False, outputs=True, grads=False)
    run_to_end(execution)
    for edit in made:
        edit.check()
    return Outcome(results.pop(), cache)


def run_to_end(execution: Execution) -> None:
    """Run what has no block; raises what went wrong."""
    failure = execution.run([])
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its frames refer to this one


def _pair(edit: object) -> tuple[Selector | At, Change]:
    pair = cast("tuple[Any, ...]", edit) if isinstance(edit, (tuple, list)) else ()
    if len(pair) != 2 or not (callable(pair[1]) or isinstance(pair[1], (Tensor, int, float))):
        raise InputError(
            f"edits= takes pairs of modules and what becomes of their .hidden: a function of it, a "
            f"tensor or a number, as in [('transformer.h.0.mlp', lambda h: h * 2)]; not "
            f"{_told(edit)}."
        )
    return pair[0], pair[1]


def _told(edit: object) -> str:
    """What was given in the place of a pair, in few words."""
    if isinstance(edit, tuple):
        return f"({', '.join(_told(each) for each in cast('tuple[object, ...]', edit))})"
    return edit.path if isinstance(edit, Envoy) else f"{edit!r:.40}"
