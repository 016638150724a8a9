"""What a forecast knows of envoys, tracers and the model's values: what it may ask for ahead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn, final

from torch import Tensor
from torch.nn import Parameter

from tracekit.architectures import Sharing
from tracekit.capture import Block, Scope, Unsure
from tracekit.core.nest import first_input
from tracekit.core.quirks import is_config
from tracekit.core.settings import settings
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.words import ACTIVATIONS
from tracekit.interleave.ahead import Foretold, Stop, Wanted, ask_ahead
from tracekit.interleave.answers import Made
from tracekit.interleave.protocol import NextStep
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.envoy import Calls, Envoy, child_of, place_of
from tracekit.tracing.glance import Asked, Look
from tracekit.tracing.save import save
from tracekit.tracing.standard import activation_of, named_child_of
from tracekit.tracing.steps import steps_of

_SLOTS: Final = {
    "output": Slot.OUTPUT,
    "hidden": Slot.OUTPUT,
    "input": Slot.INPUT,
    "inputs": Slot.INPUT,
}
_TENSORS: Final = (Tensor, Parameter)
_VIEW: Final = object()  # a value of the model's, or a view: which makes no difference here
_WHEREVER: Final = 100  # levels deep
_NO_TENSORS: Final = (int, str, float, bool, type(None))


def forecast(
    block: Block, frame: Any, tracer: Any, tree: Tree, taken: Mapping[str, object] | None = None
) -> Foretold | None:
    """What the block in `frame` will ask; None where nothing can be said of it.

    `taken` are names that mean something else to the block than they mean in the frame by now.
    """
    plan = block.plan()
    if not (settings.defer_reads and plan.is_useful):
        return None
    scope = Scope(frame, Foresight(tracer, tree, has_rows=taken is not None), taken)
    return Foretold(plan.run(scope), scope.is_as_it_was)


def foreseen(
    block: Block, frame: Any, tracer: Any, tree: Tree, taken: Mapping[str, object] | None = None
) -> tuple[Asked, Scope] | None:
    """All that the block in `frame` will ask, if it is nothing but values of one step.

    Values are not known yet, so none may decide what is asked. With it, what was looked at.
    """
    plan = block.plan()
    if not (settings.defer_reads and plan.is_complete):
        return None
    scope = Scope(frame, Foresight(tracer, tree, has_rows=True), taken)
    steps = plan.run(scope)
    looks: list[Look] = []
    lines: dict[int, Line] = {}  # a loop asks many times at one
    look: Look | None = None
    try:
        while True:
            wanted, line = steps.send(look)
            if not isinstance(wanted, Wanted) or wanted.call:
                return None
            if line not in lines:
                lines[line] = Line(block.filename, line)
            look = Look(Visit(wanted.site), lines[line], wanted.part)
            looks.append(look)
    except StopIteration:
        return Asked(looks, scope.is_as_it_was), scope
    except Exception:  # noqa: BLE001 - Unsure, or an error that is the block's to raise
        return None


def ask_group(block: Block, tracer: Any, tree: Tree, group: int) -> None:
    """Called in a block, by its frame: ask ahead for the `group`-th run of its statements."""
    mediator = current_mediator()
    if mediator is None or mediator.answers is not None or not settings.defer_reads:
        return
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    plan = block.plan(group)
    scope = Scope(frame, Foresight(tracer, tree))
    ask_ahead(mediator, Foretold(plan.run(scope), scope.is_as_it_was), block.filename)


@final
class Foresight:
    """An Asking (capture.readings) for one trace of the model of `tree`."""

    def __init__(self, tracer: Any, tree: Tree, has_rows: bool = False) -> None:
        self._has_rows = has_rows  # a cache that the block makes records its own rows
        self._tracer = tracer
        self._tree = tree

    # -- objects --------------------------------------------------------------------------------

    def attribute(self, of: object, name: str) -> object:
        """A child, a plain value of its module, or a field of the model's configuration."""
        if isinstance(of, Envoy):
            return self._attribute_of_envoy(of, name)
        if is_config(of):
            return _plain(getattr(of, name))
        raise Unsure

    def _attribute_of_envoy(self, envoy: Envoy, name: str) -> object:
        if name == "calls":
            return envoy.calls
        if hasattr(type(envoy), name):
            raise Unsure
        child = child_of(envoy, name) or named_child_of(envoy, name)
        if child is not None:
            return child
        module = envoy.module
        if name not in vars(module) or hasattr(type(module), name):
            raise Unsure
        return _plain(vars(module)[name])

    def item(self, of: object, index: object) -> object:
        """A child, or a call of a module."""
        if isinstance(of, Envoy) and isinstance(index, (int, str, slice)):
            return of[index]
        if isinstance(of, Calls) and isinstance(index, int):
            return of[index]
        raise Unsure

    def elements(self, of: object) -> Iterable[object]:
        """The children of an Envoy."""
        if isinstance(of, Envoy):
            return list(of)
        raise Unsure

    # -- requests -------------------------------------------------------------------------------

    def has_value(self, of: object, name: str) -> bool:
        """Whether it is an Envoy that has a value of that standard name."""
        return isinstance(of, Envoy) and activation_of(of, name) is not None

    def read(self, of: object, name: str) -> Wanted:
        """A value of a module, or the result of the traced call."""
        if isinstance(of, Envoy) and name not in _SLOTS:
            return _wanted_by_name(of, name, self._tree)
        if of is self._tracer and name == "result":
            return Wanted(Site(self._tree.name, Slot.RESULT))
        if not isinstance(of, Envoy) or name not in _SLOTS:
            raise Unsure
        site, call = place_of(of, self._tree, _SLOTS[name])
        return Wanted(site, call, _first_alone if name == "input" else None)

    def made(self, of: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> Made | Stop:
        """A cache, which is made here and now; or the end of the run."""
        if of is not self._tracer:
            raise Unsure
        if name == "stop" and not args and not kwargs:
            return Stop()
        if name != "cache" or self._has_rows:
            raise Unsure
        return Made(name, self._tracer.cache(*args, **kwargs))

    def steps(self, of: object, name: str, index: object) -> Iterable[tuple[int, NextStep]]:
        """What a loop over `tracer.iter[index]` waits for, one after the other."""
        if of is not self._tracer:
            raise Unsure
        steps = steps_of(index if name == "iter" and index is not None else slice(None), _unsure)
        return ((step, NextStep(step)) for step in steps)

    # -- values ---------------------------------------------------------------------------------

    def given(self, name: str, value: Any) -> object:
        """What the attribute gives, of what its request was answered with."""
        if isinstance(value, Look):
            value.depth += _WHEREVER * (name == "hidden" or name in ACTIVATIONS)
            return value
        if name == "input":
            return first_input(value)
        if name in ACTIVATIONS:
            value = first_input(value) if _is_inputs(value) else value
            return _VIEW if _first_tensor(value) is not None else _unsure()
        if name == "hidden":
            found = _first_tensor(value)
            if found is None:
                raise Unsure
            return found
        return value

    def part(self, value: Any, index: object) -> object:
        """An element of a tuple, or a view of a tensor: both are later what they are now."""
        if type(value) is tuple and type(index) is int:
            return value[index]
        indices = index if type(index) is tuple else (index,)
        is_view = all(part is None or type(part) in (int, slice, type(...)) for part in indices)
        return self._view_of(value) if is_view else _unsure()

    def _view_of(self, value: Any) -> object:
        if isinstance(value, Look):
            value.depth += 1 if value.part is None else _WHEREVER
            return value
        if value is _VIEW or type(value) in _TENSORS:
            return _VIEW
        raise Unsure

    def kept(self, value: Any, method: str) -> object:
        """The same, for save(); a view, for detach() of a tensor."""
        is_there = value is not _VIEW and not isinstance(value, Look)
        if method == "save" and not (is_there and hasattr(value, "save")):
            return value
        return self._view_of(value) if method == "detach" else _unsure()

    def is_save(self, function: object) -> bool:
        """Whether it is tracekit.save."""
        return function is save


def _wanted_by_name(envoy: Envoy, name: str, tree: Tree) -> Wanted:
    found = activation_of(envoy, name)
    if found is None or found[1].sharing is Sharing.APART:  # which is written to when it is read
        raise Unsure
    place, bound = found
    site, call = place_of(place, tree, bound.slot)
    return Wanted(site, call, _first_alone if bound.slot is Slot.INPUT else None)


def _is_inputs(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and type(value[1]) is dict


def _first_alone(inputs: Any) -> object:
    """Inputs with the first alone, which is what they had as first then."""
    return (first_input(inputs),), {}


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor, if it will be the first later: lists and dictionaries may change."""
    if type(value) in _TENSORS:
        return value
    if type(value) is tuple:
        return next((found for item in value if (found := _first_tensor(item)) is not None), None)
    return None if type(value) in _NO_TENSORS else _unsure()


def _unsure() -> NoReturn:
    """The forecast ends here: the block itself goes on, and asks."""
    raise Unsure


def _plain(value: object) -> object:
    """`value`, if everything that can be asked of it is harmless."""
    if type(value) in (int, str, float, bool, type(None)) or is_config(value):
        return value
    raise Unsure
