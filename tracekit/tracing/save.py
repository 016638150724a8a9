"""`save(x)` and `x.save()`: accepted on anything; they mark what a remote run sends back."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def save(value: T) -> T:
    """`value` itself: what a block binds is bound after it anyway, marked or not."""
    return value


def save_method(value: Any) -> Any:
    """What `value.save()` means in a block: the object's own method if it has one, else save()."""
    own = getattr(value, "save", None)
    return own() if callable(own) else save(value)
