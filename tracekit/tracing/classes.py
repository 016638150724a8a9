"""Objects that hold values, by the name of their class: apart for a file, and together again.

No code comes from a file: a class is taken from torch, transformers or the standard library, and is
filled, not called. What is of another class comes back as an Unclassed.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, MutableMapping
from enum import Enum
from typing import Any, Final, NamedTuple, cast, final

_IMPORTED: Final = frozenset({"torch", "transformers", "tracekit"})
_SEQUENCES: Final = (list, tuple, set, frozenset)


@final
class Unclassed(dict[str, Any]):
    """In the place of an object whose class no file may name: its items, as attributes too."""

    class_name: tuple[str, str]  # its module, and its name there

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self:
            raise AttributeError(name)
        return self[name]

    def __repr__(self) -> str:
        name = vars(self).get("class_name", ("", "object"))[1]
        return f"Unclassed({name}: {', '.join(map(str, self))})"


class Apart(NamedTuple):
    """An object taken apart: its kind and class, its items, and what else it has."""

    kind: str
    home: str
    name: str
    items: list[tuple[Any, Any]]
    attributes: dict[str, Any]


def apart(value: Any) -> Apart | None:
    """`value` taken apart; None if it is no object that holds values."""
    cls: Any = type(value)
    name = (cls.__module__, cls.__qualname__)
    if isinstance(value, Unclassed):
        return Apart("mapping", *value.class_name, list(value.items()), {})
    if isinstance(value, Enum):
        return Apart("enum", *name, [(None, value.name)], {})
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return Apart("named", *name, list(zip(cls._fields, value, strict=True)), {})
    if isinstance(value, _SEQUENCES):
        kind = next(each for each in cls.__mro__ if each in _SEQUENCES).__name__
        return Apart(kind, *name, list(enumerate(cast("Any", value))), {})
    if isinstance(value, Mapping):
        items = list(cast("Mapping[Any, Any]", value).items())
        taken = {key for key, _ in items} | {"data"}
        own = cast("dict[str, Any]", getattr(value, "__dict__", {}))
        return Apart("mapping", *name, items, {k: v for k, v in own.items() if k not in taken})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [each.name for each in dataclasses.fields(value)]
        items = [(each, getattr(value, each)) for each in fields if hasattr(value, each)]
        return Apart("dataclass", *name, items, {})
    return None


def together(kind: str, home: str, name: str, items: Any, attributes: dict[str, Any]) -> Any:
    """The object again: of its own class, or an Unclassed, or a plain list, tuple or set."""
    cls = _found(kind, home, name)
    values = [value for _, value in items]
    if kind in {each.__name__ for each in _SEQUENCES}:
        base = next(each for each in _SEQUENCES if each.__name__ == kind)
        return (cls or base)(values)
    if cls is None:
        made = Unclassed({str(key): value for key, value in items})
        made.class_name = (home, name)
        return made
    if kind == "enum":
        return cls[values[0]]
    if kind == "named":
        return cls(*values)
    made = cls.__new__(cls)
    if kind == "dataclass":
        for key, value in items:
            object.__setattr__(made, key, value)
        return made
    if issubclass(cls, MutableMapping) and not issubclass(cls, dict):
        vars(made)["data"] = {}  # a UserDict
    if attributes:
        vars(made).update(attributes)
    for key, value in items:
        made[key] = value
    return made


def _found(kind: str, home: str, name: str) -> Any:
    """The class, if it may be taken by its name, and is of that kind."""
    value: Any = sys.modules.get(home)
    root = home.partition(".")[0]
    if root in _IMPORTED and value is None:
        try:
            value = importlib.import_module(home)
        except ImportError:
            return None
    if root not in _IMPORTED and root not in sys.stdlib_module_names - {"__main__"}:
        return None
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, type) and _is_of(kind, value) else None


def _is_of(kind: str, cls: Any) -> bool:
    match kind:
        case "enum":
            return issubclass(cls, Enum)
        case "named":
            return issubclass(cls, tuple) and hasattr(cls, "_fields")
        case "dataclass":
            return dataclasses.is_dataclass(cls)
        case "mapping":
            return issubclass(cls, MutableMapping)
        case _:
            return cls.__name__ != "object" and issubclass(cls, _SEQUENCES)
