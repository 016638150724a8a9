"""The functional face of a model: runs with a cache or with hooks, by name; the proof of names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from tracekit.architectures.findings import Proof
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.face import (
    Caching,
    Placed,
    Start,
    both,
    calling,
    run_with_cache,
    run_with_hooks,
)
from tracekit.models.naming import proof_of
from tracekit.models.starting import Begun, begin
from tracekit.tracing.call import TracedCall
from tracekit.tracing.cut import StopAt
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.hooked import Hooked, HookPoint, Pairs
from tracekit.tracing.named_cache import NamedCache, keep_of
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.tracer import Tracer
from tracekit.tracing.wanted import Names


class Functional(Envoy):
    """A model whose activations are recorded, and changed by functions, in one call."""

    __slots__ = ("_functions",)

    _functions: list[Hooked]

    @abstractmethod
    def trace(self, *args: Any, **kwargs: Any) -> Tracer:
        """A tracer of one forward pass."""

    @abstractmethod
    def _pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedCall:
        """The call of one forward pass."""

    @property
    @abstractmethod
    def _is_edited(self) -> bool:
        """Whether lasting edits, or functions, are made in every run."""

    @abstractmethod
    def _interventions(self) -> list[Intervention]:
        """The lasting edits."""

    @showing_own_lines
    def run_with_cache(
        self,
        *args: Any,
        names_filter: Names | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        pos_slice: PosSlice = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        incl_bwd: bool | Callable[[Any], Any] = False,
        detach: bool = True,
        clone: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, NamedCache]:
        """`logits, cache = model.run_with_cache(input)`: one forward pass, and its activations.

        `cache["resid_post", 3]`, by standard name; TransformerLens' names mean the same. Takes
        what `trace` takes; its edits and hooks are made. What is returned first are the logits,
        or all that the model gives where it has none.

        `names_filter`: a name of one layer or of all, a glob, a predicate of the name, the path of
        a module, or a list of them; None is every name but `head_result`. `device` and `dtype` are
        applied to each tensor as it is recorded; None leaves it. `pos_slice` keeps positions
        alone: a number (the axis stays), a slice, a list; what has no axis "pos" is kept whole.
        `stop_at_layer=k` ends the run in front of that layer, and returns the residual stream
        there. `start_at_layer=k` begins it there: the input is the residual stream, `[batch, pos,
        model]`, and nothing before is computed; `attention_mask` and `position_ids` are as for
        tokens. With `prefix=` too it is the stream of what is behind the prefix. `incl_bwd=True`
        runs backward from the output, a scalar, or from its `.loss`; or a function of the output
        gives the scalar; `cache.grad` has the gradients.
        """
        keep = keep_of(device, dtype, detach=detach, clone=clone)
        begun = self._begun(start_at_layer, args, kwargs)
        how = (remove_batch_dim, pos_slice, stop_at_layer, incl_bwd, not self._is_edited, begun)
        caching = Caching(names_filter, keep, *how)
        call = self._pass(args, kwargs) if begun is None else begun.call
        return run_with_cache(self._start(begun), self._tree, call, caching)

    @showing_own_lines
    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Pairs = (),
        bwd_hooks: Pairs = (),
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward pass, with functions called at activations; its logits.

        `fwd_hooks=[(("resid_post", 3), fn)]`: names are as for `run_with_cache`, and `fn(tensor,
        hook)` returns what takes the activation's place, or None. `hook.name` is the name,
        `hook.layer()` the number of its layer. Functions of `bwd_hooks` are called so with the
        gradient, whenever backward comes there. NeverRanError for a function that was not called.
        `start_at_layer` and `stop_at_layer` are as for `run_with_cache`.
        """
        functions = both(self._tree, fwd_hooks, bwd_hooks)
        stop = None if stop_at_layer is None else StopAt(self._tree, stop_at_layer)
        begun = self._begun(start_at_layer, args, kwargs)
        if begun is not None:
            begun.check(functions, stop)
        call = self._pass(args, kwargs) if begun is None else begun.call
        return run_with_hooks(self._start(begun), call, functions, stop)

    def hooks(self, fwd_hooks: Pairs = (), bwd_hooks: Pairs = ()) -> Placed:
        """`with model.hooks(fwd_hooks=[(name, fn)]):` functions at activations, in every run in it.

        In calls, traces and generations of this model, in every forward. Its torch module is as it
        was outside of them. NeverRanError, at the end, if there was no run.
        """
        return Placed(self._functions, both(self._tree, fwd_hooks, bwd_hooks))

    @showing_own_lines
    def add_hook(
        self,
        name: Names,
        function: Callable[[Any, HookPoint], Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        *,
        is_permanent: bool = False,
    ) -> Hooked:
        """Let `function` be called at activations in every run, until it is removed.

        By `.remove()` of what is returned, or `model.reset_hooks()`, if not `is_permanent`.
        """
        made = Hooked(self._tree, name, function, dir, "add_hook()", is_permanent=is_permanent)
        self._functions.append(made)
        return made

    def reset_hooks(self, *, including_permanent: bool = False) -> None:
        """Take away what `add_hook` added; neither what a `with model.hooks()` around it has, nor
        PyTorch hooks on the modules."""
        for each in self._functions:
            if not each.is_scoped and (including_permanent or not each.is_permanent):
                each.remove()

    def _begun(
        self, layer: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Begun | None:
        """The run on a residual stream; None for one on other inputs."""
        return None if layer is None else begin(self._tree, args, layer, kwargs, self._begin_with)

    def _begin_with(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a run in front of a layer, completed."""
        if inputs.get("prefix") is not None:
            raise InputError("prefix= is for a LanguageModel, which has prefill().")
        return inputs

    def _start(self, begun: Begun | None = None) -> Start:
        tree = self._tree if begun is None else begun.tree

        def started(call: TracedCall, functions: Sequence[Hooked | StopAt] = ()) -> Execution:
            more = [calling(functions)] if functions else []
            return Execution(tree, call, None, [*self._interventions(), *more])

        return started

    @showing_own_lines
    def check_names(self, *args: Any, **kwargs: Any) -> Proof:
        """Prove the standard names of this model by its numbers; takes what `trace` takes.

        The residual stream adds up, each name is of its stated shape and a view, heads add up, a
        write changes what it must and nothing in front. It runs several times for every name; print
        what it returns, `.failed` lists what does not hold. Names of an architecture that is not
        declared are looked for by structure: those proved are there from then on.
        """
        return proof_of(self, self._tree, partial(self.trace, *args, **kwargs))
