"""The values of one place in the model, a module's or an operation's: read, replaced, skipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from tracekit.core.nest import describe, first_input, first_tensor, replace_first_tensor
from tracekit.core.site import Site, Slot
from tracekit.errors import MisfitError
from tracekit.interleave.mediator import Mediator


class Slots(ABC):
    """What can be read and written of a place; whoever has it says where that is."""

    __slots__ = ()

    _path: str
    _call: int  # the how-manieth call within a step is meant

    @abstractmethod
    def _at(self, slot: Slot, name: str) -> tuple[Mediator, Site]:
        """Whom to ask for a value of this place, and for what; `name` is what the user wrote."""

    @property
    def output(self) -> Any:
        """What it returned: exactly that, a tensor for one family, a tuple for another."""
        mediator, site = self._at(Slot.OUTPUT, "output")
        return mediator.read(site, self._call)

    @output.setter
    def output(self, value: Any) -> None:
        mediator, site = self._at(Slot.OUTPUT, "output")
        mediator.write(site, value, self._call)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What it was called with: `(args, kwargs)`."""
        mediator, site = self._at(Slot.INPUT, "inputs")
        return mediator.read(site, self._call)  # pyright: ignore[reportReturnType] - hooks always give this pair

    @inputs.setter
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        mediator, site = self._at(Slot.INPUT, "inputs")
        mediator.write(site, value, self._call)

    @property
    def input(self) -> Any:
        """The first positional argument, or the first keyword argument if there is none."""
        return first_input(self.inputs)

    @input.setter
    def input(self, value: Any) -> None:
        args, kwargs = self.inputs
        if args:
            self.inputs = ((value, *args[1:]), kwargs)
        elif kwargs:
            self.inputs = (args, {**kwargs, next(iter(kwargs)): value})
        else:
            raise MisfitError(f"{self._path} was called without arguments; there is no .input.")

    @property
    def hidden(self) -> Any:
        """The hidden-state tensor of the output: itself, or the first tensor of its structure.

        Shape is the family's own, usually `(batch, positions, model)`. Assigning puts the new
        tensor into the same structure.
        """
        found = first_tensor(self.output)
        if found is None:
            raise MisfitError(f"{self._path}.output is {describe(self.output)}, with no tensor.")
        return found

    @hidden.setter
    def hidden(self, value: Any) -> None:
        self.output = replace_first_tensor(self.output, value)

    def skip(self, value: Any) -> None:
        """Do not run it in this step; its output is `value`."""
        mediator, site = self._at(Slot.OUTPUT, "skip()")
        mediator.skip(site, value, self._call)
