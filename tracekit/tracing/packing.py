"""Values as JSON beside tensors, and back again: all that a cache may hold, and no pickle."""

# A value is null, a boolean, a number or text as it is, and anything else an object of JSON whose
# first key says what: {"tensor": [stack, row]}, {"tuple": […]}, {"dict": [[key, value], …]}, …

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.core.keep import Note
from tracekit.errors import UnsupportedError
from tracekit.tracing.arrivals import Arrival
from tracekit.tracing.classes import apart, together
from tracekit.tracing.entries import ABSENT
from tracekit.tracing.shelf import Find, Place, Shelf, restored

_PLAIN: Final = (type(None), bool, int, float, str)
_SEQUENCES: Final[dict[type[Any], str]] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    torch.Size: "size",
}


@final
class Packer:
    """Turns values into JSON, and puts their tensors on a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._when = ""  # of whose visit a value is, for errors

    def of_visit(self, value: Any, name: str, when: str) -> Any:
        """`value`, whose tensors get `name`; UnsupportedError names what can't be written."""
        self._when = when
        return self.value(value, name)

    def value(self, value: Any, name: str) -> Any:
        """`value`, which lies at `name`."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor):
            try:
                return self.shelf.put(name, value)
            except TypeError as error:
                raise self._refused(name, value, str(error)) from None
        kind = _SEQUENCES.get(type(value))
        if kind is not None:
            items = [self.value(item, f"{name}.{at}") for at, item in enumerate(value)]
            return {kind: items}
        if type(value) is dict:
            return {"dict": self._pairs(value.items(), name)}  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType] - a model's own
        return self._rarer(value, name)

    def _pairs(self, items: Any, name: str) -> list[list[Any]]:
        pairs: list[list[Any]] = []
        for key, item in items:
            at = key if isinstance(key, (str, int)) else "item"
            pairs.append([self.value(key, name), self.value(item, f"{name}.{at}")])
        return pairs

    def _rarer(self, value: Any, name: str) -> dict[str, Any]:
        if value is ABSENT:
            return {"absent": None}
        if isinstance(value, Note):
            return {"note": [value.type, value.length]}
        if isinstance(value, Arrival):
            gradient = value.gradient
            return {"arrival": None if gradient is None else self.value(gradient, name)}
        if type(value) is complex:
            return {"complex": [value.real, value.imag]}
        if type(value) is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, (torch.dtype, torch.device)):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, (slice, range)):
            parts = [self.value(each, name) for each in (value.start, value.stop, value.step)]
            return {type(value).__name__: parts}
        return self._object(value, name)

    def _object(self, value: Any, name: str) -> dict[str, Any]:
        found = apart(value)
        if found is not None:
            attributes: list[list[Any]] = []
            for key, each in found.attributes.items():
                try:
                    attributes.append([key, self.value(each, f"{name}.{key}")])
                except UnsupportedError:  # as a recorder notes what it does not keep
                    attributes.append([key, {"note": [type(each).__name__, None]}])
            items = self._pairs(found.items, name)
            return {"object": [found.kind, found.home, found.name, items, attributes]}
        for base in (bool, int, float, str, bytes):  # a number of numpy, for one
            if isinstance(value, base) and type(value).__module__ == "numpy":
                return {"numpy": [str(value.dtype), self.value(value.item(), name)]}  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType, reportAttributeAccessIssue] - of numpy
        raise self._refused(name, value, "take tensors, numbers or text from it")

    def _refused(self, name: str, value: object, cure: str) -> UnsupportedError:
        when = f" ({self._when})" if self._when else ""
        return UnsupportedError(
            f"{name}{when} is {_told(value)}, which can't be written to a file: {cure}."
        )


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        kind = "tensor" if type(value) is Tensor else type(value).__name__
        return f"a {kind} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


@final
class Unpacker:
    """Turns JSON back into values; `find` gives the memory of tensors."""

    def __init__(self, part: int, find: Find) -> None:
        self._part = part
        self._find = find
        self._kinds: dict[str, Callable[[Any], Any]] = {
            "list": self._items,
            "tuple": lambda content: tuple(self._items(content)),
            "set": lambda content: set(self._items(content)),
            "frozenset": lambda content: frozenset(self._items(content)),
            "size": torch.Size,
            "dict": lambda pairs: {self.value(key): self.value(item) for key, item in pairs},
            "absent": lambda _: ABSENT,
            "note": lambda told: Note(*told),
            "arrival": self._arrival,
            "complex": lambda parts: complex(*parts),
            "bytes": bytes.fromhex,
            "dtype": lambda name: getattr(torch, name),
            "device": torch.device,
            "slice": lambda parts: slice(*self._items(parts)),
            "range": lambda parts: range(*parts),
            "object": self._object,
            "numpy": _of_numpy,
        }

    def value(self, packed: Any) -> Any:
        """What was packed."""
        if type(packed) in _PLAIN:
            return packed
        if "tensor" in packed:
            place = Place(packed.get("part", self._part), *packed["tensor"])
            return restored(packed, self._find(place))
        ((kind, content),) = packed.items()
        return self._kinds[kind](content)

    def _items(self, content: Any) -> list[Any]:
        return [self.value(item) for item in content]

    def _arrival(self, gradient: Any) -> Arrival:
        made = Arrival()
        made.gradient = self.value(gradient)
        return made

    def _object(self, told: Any) -> Any:
        kind, home, name, items, attributes = told
        pairs = [(self.value(key), self.value(item)) for key, item in items]
        others = {key: self.value(item) for key, item in attributes}
        return together(kind, home, name, pairs, others)


def _of_numpy(told: Any) -> Any:
    import numpy

    return numpy.dtype(told[0]).type(told[1])
