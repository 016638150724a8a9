"""`model.plan(block, input)`: a run on fake tensors that tells what the real one will hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType, TracebackType
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.capture import showing_own_lines
from tracekit.core.keep import Keep
from tracekit.core.ledger import Ledger
from tracekit.core.supposed import SupposingMode
from tracekit.core.twin import copied
from tracekit.errors import DryRunError, UnsupportedError
from tracekit.models.generate_options import without_ends
from tracekit.models.planned_passes import Forwards
from tracekit.models.planned_sites import ORIGINALS, Kept, move
from tracekit.models.planned_steps import Steps
from tracekit.models.planned_twin import planned_twin
from tracekit.models.scanning import place_of
from tracekit.models.signatures import by_name
from tracekit.models.verdicts import Need, capacity_of, judged
from tracekit.tracing.cache import Cache
from tracekit.tracing.planned import Plan, said
from tracekit.tracing.tracer import Tracer

_REFUSED: Final = {
    "verify": "it compares two runs: verify the edit, and plan the run without it",
    "prefix": "plan the whole text as one input, which is an upper bound",
    "start_at_layer": "plan the pass from the first layer on, which is an upper bound",
}
_LENGTHS: Final = ("max_new_tokens", "max_length")
INPUTS: Final = "inputs"


@final
class Planner:
    """One planned run; used once. The tracer of its block, and then the plan."""

    def __init__(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        memory: Mapping[str, str | int] | None,
        device: torch.device | str | None,
        all_steps: bool,
    ) -> None:
        _refuse(kwargs)
        self._function: Callable[..., Any] | None = None
        self._all_steps = all_steps
        self._caches: list[Cache] = []
        self._copies = False  # whether sites are recorded for the first time
        self._ledger = Ledger()
        self._stead = _stead(model, device)  # the device that the CPU stands for, if it does
        self._on_host: list[Cache] = []  # of caches there, those that are kept on the CPU
        self._tree, self._weights = planned_twin(model._tree, self._ledger, self._stead)
        self._tree.planner = self
        self._forwards = Forwards(self._tree, self._ledger)
        self._capacity = capacity_of(memory, self._weights)
        self._is_generation = any(kwargs.get(name) is not None for name in _LENGTHS)
        self._steps: Steps | None = None  # of a generation
        own = copy.copy(model)
        object.__setattr__(own, "_tree", self._tree)
        start: Any = own.generation if self._is_generation else own.trace
        self.tracer: Tracer = start(*args, **kwargs)
        self.tracer.planner = self
        self.made: Plan | None = None

    # -- what the run asks, and tells -------------------------------------------------------------

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is given, on fake tensors; of a generation, for the steps that are run."""
        mode = self._tree.mode
        assert isinstance(mode, SupposingMode)
        args, kwargs = copied((args, kwargs), mode.fake_tensor)
        self._ledger.see((args, kwargs), INPUTS)
        if not self._is_generation:
            return args, kwargs
        module: Any = self._tree.root
        kwargs = without_ends(module, by_name(module, args, kwargs))
        self._steps = Steps(module, kwargs, self.tracer, self._function, self._all_steps)
        return (), {**kwargs, "max_new_tokens": self._steps.run, "max_length": None}

    def record(self, cache: Cache, keep: Keep) -> Keep:
        """A cache is made in the run; how it is to keep values."""
        self._caches.append(cache)
        if self._stead is None or keep.device is None or keep.device.type != "cpu":
            return keep
        self._on_host.append(cache)
        return replace(keep, clone=True)  # as moving it to the CPU will do

    def copies(self, original: Tensor) -> None:
        """A value is recorded as a copy, and its original is kept until the run ends."""
        self._ledger.see(original, ORIGINALS)
        self._copies = True

    # -- the block --------------------------------------------------------------------------------

    def run(self, function: Callable[..., Any] | None) -> Plan:
        """The plan of a run with `function` as its block."""
        self._function = function or _nothing
        try:
            kept = self.tracer.run(self._function)
            self._conclude()
            del kept
        except DryRunError as error:
            raise self._explained(error) from None
        finally:
            self._ledger.close()
        assert self.made is not None
        return self.made

    def __enter__(self) -> Tracer:
        return self.tracer.__enter__()

    @showing_own_lines
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Any:
        try:
            is_own = self.tracer.__exit__(kind, error, traceback)
            if error is None or is_own:
                self._conclude()
            return is_own
        except DryRunError as failure:
            raise self._explained(failure) from None
        finally:
            self._ledger.close()

    def _explained(self, error: DryRunError) -> DryRunError:
        """`error`, with the line of the model's code where it came; of a block it says its own."""
        place = place_of(error, self._tree.root)
        if place is None:
            return error
        what = str(error.args[0]).partition(": ")[0]
        return DryRunError(
            f"{type(self._tree.root).__name__} can't be planned: at {place} {what}. Measure a "
            f"trace of a small input instead."
        )

    # -- the plan ---------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """Make the plan; nothing else is kept."""
        if self._stead is not None:
            move(self._ledger, self._stead, self._on_host)
        kept = Kept(self._ledger, self._tree, self._caches)
        steps = self._steps or Steps.of_a_forward()
        told = steps.told(self._ledger, self._forwards, kept.sites)
        need = Need.of(told, self._weights, self._ledger)
        verdict, why = judged(need, self._capacity)
        notes = list(told.notes)
        mode = self._tree.mode
        assert isinstance(mode, SupposingMode)
        if mode.is_bounded:
            notes.append(_BOUND)
        if self._stead is not None:
            notes.append(_IN_STEAD.format(self._stead))
        if self._copies:
            notes.append(_COPIES)
        if kept.in_graphs:
            notes.append(_IN_GRAPHS.format(said(kept.in_graphs)))
        self.made = Plan(
            steps.count,
            told.sites,
            self._weights.lying,
            self._weights.brought_in,
            need.kv_cache,
            told.kv_cache,
            need.peak,
            need.at_peak,
            self._capacity,
            verdict,
            why,
            tuple(notes),
        )
        self._caches.clear()
        self._on_host.clear()
        self._ledger.close()


_IN_STEAD: Final = (
    "{} is not used for this: sizes are as the CPU makes them, and what a block moves to the CPU "
    "itself is counted there still."
)
_COPIES: Final = (
    "the first recording of a module takes a copy, and keeps the original until the run ends: "
    "later traces of the same kind take less."
)
_IN_GRAPHS: Final = (
    "what the block keeps has a graph, which holds {} for a backward pass: .detach() it, or trace "
    "under torch.no_grad()."
)
_BOUND: Final = (
    "sizes that numbers decide (which tokens an expert gets) are the most they can be: a bound."
)


def _nothing() -> None:
    """The block of a plan that has none."""


def _stead(model: Any, device: torch.device | str | None) -> str | None:
    """The device that the model is planned for, if it is another than where it is."""
    asked: Any = device
    if asked is None and all(weight.is_meta for weight in model.module.parameters()):
        _, options = getattr(model, "_empty_from", None) or (None, {})
        asked = options.get("device", options.get("device_map"))
    if not isinstance(asked, (str, int, torch.device)) or asked in _MAPS:
        return None
    found = torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)
    name = "cuda:0" if str(found) == "cuda" else str(found)
    return None if name == "cpu" else name


_MAPS: Final = ("auto", "balanced", "balanced_low_0", "sequential")


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, instead in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"plan() takes no {name}=: {instead}.")


def is_a_block(value: object) -> bool:
    """Whether it is a function that is to be run as a block, and no input."""
    return isinstance(value, (FunctionType, MethodType, partial))
