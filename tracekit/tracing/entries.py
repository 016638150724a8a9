"""Entry: what was recorded at one visit. Entries: all visits to one module, in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, final, overload

import torch

from tracekit.core.nest import Nest, describe, first_input, first_tensor, map_leaves
from tracekit.errors import CacheError
from tracekit.tracing.arrivals import Arrival
from tracekit.tracing.timeline import Pass


class Absent(Enum):
    """In the place of what was not recorded; an Enum, so that it survives pickling as itself."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


class Later(ABC):
    """In the place of a value that lies in a file: read when it is asked for."""

    __slots__ = ()

    @abstractmethod
    def read(self) -> Any:
        """The value; StorageError if the file does not hold it any more."""
        ...

    @abstractmethod
    def look(self) -> Any:
        """The value as it lies in the file, for its shapes: its numbers are not proved."""
        ...

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.read(),)  # a copy is in memory


def _same(value: Any) -> Any:
    return value


def _read(held: Any) -> Any:
    return held.read() if isinstance(held, Later) else held


def _look(held: Any) -> Any:
    return held.look() if isinstance(held, Later) else held


@final
class Entry:
    """One visit: at which `step`, which `call` of the module in that step, inputs and output.

    `during` is the forward of the decoder that it was part of, with its positions; None for what
    runs outside of them, as an encoder does in a generation.
    """

    __slots__ = ("_grad", "_inputs", "_output", "call", "during", "path", "step")

    def __init__(
        self,
        path: str,
        step: int,
        call: int,
        inputs: Any,
        output: Any,
        grad: Any = ABSENT,
        during: Pass | None = None,
    ) -> None:
        self.during = during
        self.path = path
        self.step = step
        self.call = call
        self._inputs = inputs
        self._output = output
        self._grad = grad  # a nest of Arrivals and None, in the structure of the output

    @property
    def output(self) -> Any:
        """What the module returned, after all edits; CacheError if that was not recorded."""
        if self._output is ABSENT:
            raise CacheError(
                f"{self.path} has no output in this cache: "
                f"{self._why_absent('include_output', 'its call did not return')}."
            )
        return _read(self._output)

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden-state tensor of the output: itself, or the first tensor of its structure."""
        found = first_tensor(self.output)
        if found is None:
            raise CacheError(f"{self.path}.output is {describe(self.output)}, with no tensor.")
        return found

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module was called with, after all edits: `(args, kwargs)`.

        CacheError if the cache was made without `include_inputs=True`.
        """
        if self._inputs is ABSENT:
            raise CacheError(
                f"{self.path} has no inputs in this cache: "
                f"{self._why_absent('include_inputs', 'they were not seen')}."
            )
        return _read(self._inputs)

    @property
    def input(self) -> Any:
        """The first positional argument, or the first keyword argument if there is none."""
        return first_input(self.inputs)

    @property
    def grad(self) -> Any:
        """The gradient of the output, in its structure, with None where none has come.

        The sum over all backward passes so far, as torch's own `.grad`; it has no graph.
        CacheError, with the reason, if there is none.
        """
        if self._grad is ABSENT:
            raise CacheError(
                f"{self.path} has no gradient in this cache: it was made without "
                f"include_grads=True, or its call did not return."
            )
        awaited = _read(self._grad)
        arrivals = _arrivals(awaited)
        if not arrivals:
            raise CacheError(
                f"{self.path}.output did not require grad (frozen parameters?), so it has no "
                f"gradient: make an early value the leaf of the graph, as in "
                f"model.transformer.wte.output.requires_grad_(True)."
            )
        if all(arrival.gradient is None for arrival in arrivals):
            raise CacheError(
                f"no backward pass has come to {self.path}.output: call loss.backward() first, in "
                f"the block or after it, of a loss that was computed from it."
            )
        return map_leaves(_gradient, awaited)

    @property
    def positions(self) -> range | None:
        """The positions of the sequence that the forward went over; None if it was none of them.

        Columns of the batch, padding included. Several forwards make the first step of a prompt
        in chunks; what was drafted and rejected is in it, too.
        """
        return None if self.during is None else range(self.during.start, self.during.stop)

    def mapped(self, change: Callable[[Any], Any]) -> Entry:
        """This entry with `change` made of each value in it."""
        inputs, output, grad = (
            each if each is ABSENT else map_leaves(change, _read(each))
            for each in (self._inputs, self._output, self._grad)
        )
        return Entry(self.path, self.step, self.call, inputs, output, grad, self.during)

    def _why_absent(self, option: str, otherwise: str) -> str:
        recorded = self._inputs if option == "include_output" else self._output
        if recorded is ABSENT:
            return otherwise
        return f"it was made without {option}=True, or {otherwise}"

    def __repr__(self) -> str:
        parts = [f"step={self.step}"]
        if self.call:
            parts.append(f"call={self.call}")
        if self._inputs is not ABSENT:
            parts.append(f"input={describe(first_input(_look(self._inputs)))}")
        if self._output is not ABSENT:
            parts.append(f"output={describe(_look(self._output))}")
        if self._grad is not ABSENT:
            awaited = _look(self._grad)
            came = any(arrival.gradient is not None for arrival in _arrivals(awaited))
            told = describe(map_leaves(_gradient, awaited)) if came else "not yet"
            parts.append(f"grad={told}")
        return f"Entry({', '.join(parts)})"


def _arrivals(awaited: Nest) -> list[Arrival]:
    found: list[Any] = []
    map_leaves(found.append, awaited)
    return [leaf for leaf in found if isinstance(leaf, Arrival)]


def _gradient(leaf: object) -> torch.Tensor | None:
    return leaf.gradient if isinstance(leaf, Arrival) else None


@final
class Entries(Sequence[Entry]):
    """All visits to one module: one Entry for each, in order, however many there were.

    With one Entry, `.output`, `.hidden`, `.input`, `.inputs` and `.grad` reach through to it; with
    several they raise CacheError, as one value would have to be guessed.
    """

    __slots__ = ("_entries", "path")

    def __init__(self, path: str, entries: list[Entry]) -> None:
        self.path = path
        self._entries = entries

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return Entries(self.path, self._entries[index])
        try:
            return self._entries[index]
        except IndexError:
            raise IndexError(
                f"{self.path} has {len(self)} entries in this cache; there is no [{index}]."
            ) from None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def at(self, step: int) -> Entries:
        """The entries of one step: modules may run several times in it, or not at all."""
        return Entries(self.path, [entry for entry in self._entries if entry.step == step])

    @property
    def output(self) -> Any:
        """The output of the only Entry."""
        return self._only("output").output

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden-state tensor of the only Entry."""
        return self._only("hidden").hidden

    @property
    def input(self) -> Any:
        """The first input of the only Entry."""
        return self._only("input").input

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The `(args, kwargs)` of the only Entry."""
        return self._only("inputs").inputs

    @property
    def outputs(self) -> list[Any]:
        """The outputs of all entries, in order."""
        return [entry.output for entry in self._entries]

    @property
    def grad(self) -> Any:
        """The gradient of the output of the only Entry."""
        return self._only("grad").grad

    @property
    def grads(self) -> list[Any]:
        """The gradients of the outputs of all entries, in order."""
        return [entry.grad for entry in self._entries]

    def _only(self, name: str) -> Entry:
        if len(self._entries) == 1:
            return self._entries[0]
        every = "grads" if name == "grad" else "outputs"
        raise CacheError(
            f"{self.path} has {len(self)} entries, so .{name} is not one value: "
            f"name one, as in [0].{name}, or take .{every}, a list."
        )

    def __repr__(self) -> str:
        inner = ", ".join(repr(entry) for entry in self._entries[:4])
        more = f", … {len(self) - 4} more" if len(self) > 4 else ""
        return f"Entries({self.path}: [{inner}{more}])"
