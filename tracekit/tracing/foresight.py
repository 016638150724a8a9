"""What a forecast knows of envoys, tracers and the model's values: what it may ask for ahead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, final

from torch import Tensor
from torch.nn import Parameter

from tracekit.capture import Block, Scope, Unsure
from tracekit.core.nest import first_input, first_tensor
from tracekit.core.quirks import is_config, own_children
from tracekit.core.settings import settings
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.interleave.ahead import Forecast, Stop, Wanted, ask_ahead
from tracekit.interleave.answers import Made
from tracekit.interleave.protocol import NextStep
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.envoy import Calls, Envoy, place_of
from tracekit.tracing.glance import Asked
from tracekit.tracing.save import save
from tracekit.tracing.steps import steps_of

_SLOTS: Final = {
    "output": Slot.OUTPUT,
    "hidden": Slot.OUTPUT,
    "input": Slot.INPUT,
    "inputs": Slot.INPUT,
}
_TENSORS: Final = (Tensor, Parameter)
_VIEW: Final = object()  # a value of the model's, or a view: which makes no difference here


def forecast(
    block: Block, frame: Any, tracer: Any, tree: Tree, taken: Mapping[str, object] | None = None
) -> Forecast | None:
    """What the block in `frame` will ask; None where nothing can be said of it.

    `taken` are names that mean something else to the block than they mean in the frame by now.
    """
    plan = block.plan()
    if not (settings.defer_reads and plan.is_useful):
        return None
    return plan.run(Scope(frame, Foresight(tracer, tree, has_rows=taken is not None), taken))


def foreseen(block: Block, frame: Any, tracer: Any, tree: Tree) -> Asked | None:
    """All that the block in `frame` will ask, if it is nothing but values of one step.

    Values are not known yet, so none may decide what is asked.
    """
    plan = block.plan()
    if not (settings.defer_reads and plan.is_complete):
        return None
    steps = plan.run(Scope(frame, Foresight(tracer, tree, has_rows=True)))
    asked: list[tuple[Visit, Line]] = []
    try:
        wanted, line = next(steps)
        while isinstance(wanted, Wanted):
            visit = Visit(wanted.site, 0, wanted.call)
            asked.append((visit, Line(block.filename, line)))
            wanted, line = steps.send(_VIEW)
    except StopIteration:
        return asked if all(visit.call == 0 for visit, _ in asked) else None
    except Exception:  # noqa: BLE001 - Unsure, or an error that is the block's to raise
        return None
    return None


def ask_group(block: Block, tracer: Any, tree: Tree, group: int) -> None:
    """Called in a block, by its frame: ask ahead for the `group`-th run of its statements."""
    mediator = current_mediator()
    if mediator is None or mediator.answers is not None or not settings.defer_reads:
        return
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    plan = block.plan(group)
    ask_ahead(mediator, plan.run(Scope(frame, Foresight(tracer, tree))), block.filename)


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
        module = envoy.module
        if own_children(module).get(name) is not None:
            return getattr(envoy, name)
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

    def read(self, of: object, name: str) -> Wanted:
        """A value of a module, or the result of the traced call."""
        if of is self._tracer and name == "result":
            return Wanted(Site(self._tree.name, Slot.RESULT))
        if not isinstance(of, Envoy) or name not in _SLOTS:
            raise Unsure
        return Wanted(*place_of(of, self._tree, _SLOTS[name]))

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
        if value is _VIEW:
            return value
        if name == "input":
            return first_input(value)
        if name == "hidden":
            found = first_tensor(value) if type(value) in (*_TENSORS, tuple) else None
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
        if is_view and (value is _VIEW or type(value) in _TENSORS):
            return _VIEW
        raise Unsure

    def kept(self, value: Any, method: str) -> object:
        """The same, for save(); a view, for detach() of a tensor."""
        if method == "save" and (value is _VIEW or not hasattr(value, "save")):
            return value
        if method == "detach" and (value is _VIEW or type(value) in _TENSORS):
            return _VIEW
        raise Unsure

    def is_save(self, function: object) -> bool:
        """Whether it is tracekit.save."""
        return function is save


def _unsure() -> int:
    """How many steps the run will have: the block asks for that itself."""
    raise Unsure


def _plain(value: object) -> object:
    """`value`, if everything that can be asked of it is harmless."""
    if type(value) in (int, str, float, bool, type(None)) or is_config(value):
        return value
    raise Unsure
