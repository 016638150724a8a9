"""The values of one place in the model, a module's or an operation's: read, replaced, skipped."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar, final

from tracekit.capture import showing_own_lines, takes_next
from tracekit.core.nest import describe, first_input, first_tensor, replace_first_tensor
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import MisfitError, OutsideTraceError, UnsupportedError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.at import Spot

T_co = TypeVar("T_co", bound="Slots", covariant=True)


class Slots(ABC):
    """What can be read and written of a place; whoever has it says where that is."""

    __slots__ = ()

    _path: str
    _call: int  # the how-manieth call within a step is meant

    @abstractmethod
    def _at(self, slot: Slot, name: str) -> tuple[Mediator, Site]:
        """Whom to ask for a value of this place, and for what; `name` is what the user wrote."""

    def _spot(self, slot: Slot) -> Spot:
        """What `.at(positions)` is asked of, in the place of a value; nothing is read for it."""
        raise UnsupportedError(
            f"{self._path} is an operation inside a module: positions can be chosen of what "
            f"modules give, as in model.transformer.h[0].output.at('prompt')."
        )

    @property
    @showing_own_lines
    def output(self) -> Any:
        """What it returned: exactly that, a tensor for one family, a tuple for another.

        Reading blocks until the model gets there. SiteOrderError where it has passed, NeverRanError
        where it did not come, OutsideTraceError where no model runs. An assigned value has to have
        the structure, shapes, dtypes and devices of the old one, else MisfitError.

        In a generation it is the value of one step. `output.at("generated")[:] += v` edits tokens
        instead, in whatever forward they come: `.at("prompt")`, `.at("all")`, `.at(3)`,
        `.at(slice(2, 5))`, `.at([0, -1])`.
        """
        if takes_next(sys._getframe(2), "at"):  # pyright: ignore[reportPrivateUsage] - asked at every read
            return self._spot(Slot.OUTPUT)
        mediator, site = self._at(Slot.OUTPUT, "output")
        return mediator.read(site, self._call)

    @output.setter
    @showing_own_lines
    def output(self, value: Any) -> None:
        mediator, site = self._at(Slot.OUTPUT, "output")
        mediator.write(site, value, self._call)

    @property
    @showing_own_lines
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it was called with: `(args, kwargs)`."""
        mediator, site = self._at(Slot.INPUT, "inputs")
        return mediator.read(site, self._call)  # pyright: ignore[reportReturnType] - hooks always give this pair

    @inputs.setter
    @showing_own_lines
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        mediator, site = self._at(Slot.INPUT, "inputs")
        mediator.write(site, value, self._call)

    @property
    @showing_own_lines
    def input(self) -> Any:
        """The first positional argument, or the first keyword argument if there is none."""
        if takes_next(sys._getframe(2), "at"):  # pyright: ignore[reportPrivateUsage] - asked at every read
            return self._spot(Slot.INPUT)
        return first_input(self.inputs)

    @input.setter
    @showing_own_lines
    def input(self, value: Any) -> None:
        args, kwargs = self.inputs
        if args:
            self.inputs = ((value, *args[1:]), kwargs)
        elif kwargs:
            self.inputs = (args, {**kwargs, next(iter(kwargs)): value})
        else:
            raise MisfitError(f"{self._path} was called without arguments; there is no .input.")

    @property
    @showing_own_lines
    def hidden(self) -> Any:
        """The hidden-state tensor of the output: itself, or the first tensor of its structure.

        Shape is the family's own, usually `(batch, positions, model)`. Assigning puts the new
        tensor into the same structure.
        """
        if takes_next(sys._getframe(2), "at"):  # pyright: ignore[reportPrivateUsage] - asked at every read
            return self._spot(Slot.OUTPUT)
        output = self.output
        found = first_tensor(output)
        if found is None:
            raise MisfitError(f"{self._path}.output is {describe(output)}, with no tensor.")
        return found

    @hidden.setter
    @showing_own_lines
    def hidden(self, value: Any) -> None:
        self.output = replace_first_tensor(self.output, value)

    @showing_own_lines
    def skip(self, value: Any) -> None:
        """Do not run it in this call; its output is `value`, and nothing inside it runs.

        In the block of an invoke this holds for its rows alone. SiteOrderError where it has begun.
        """
        mediator, site = self._at(Slot.OUTPUT, "skip()")
        mediator.skip(site, value, self._call)


@final
class Calls(Generic[T_co]):
    """The calls of one place within a step, by index."""

    def __init__(self, of_call: Callable[[int], T_co]) -> None:
        self._of_call = of_call

    def __getitem__(self, call: int) -> T_co:
        """The place at its `call`-th call in a step, counted from 0."""
        if call < 0:
            raise IndexError("calls are counted from 0; how many there will be is not known.")
        return self._of_call(call)


def mediator_of(tree: Tree, path: str, name: str) -> Mediator:
    """Whom to ask for `name`, a value of `path` in `tree`; OutsideTraceError if nobody."""
    mediator = current_mediator()
    if mediator is None:
        raise OutsideTraceError(
            f"{path}.{name} has a value only while the model runs: ask for it in the block of "
            f"`with model.trace(input):` or, in a trace that was opened without input, of "
            f"`with tracer.invoke(input):`; after it, use the names that the block bound, or a "
            f"tracer.cache()."
        )
    if not mediator.model.stands_for(tree):
        raise OutsideTraceError(
            f"{path}.{name} belongs to a model that this block is not tracing; read it in the "
            f"block of its own trace and use the name here."
        )
    return mediator


def path_in(tree: Tree, own: Tree, path: str) -> str:
    """The canonical path, in the tree of a run, of what is at `path` in `own`."""
    same = tree.name == own.name
    return tree.canonical(path if same else tree.name + path.removeprefix(own.name))
