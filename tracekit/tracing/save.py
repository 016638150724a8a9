"""`save(x)` and `x.save()`: accepted on anything, as nnsight needs them; they change nothing."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def save(value: T) -> T:
    """`value` itself: what a block binds is bound after it anyway, saved or not."""
    return value


def save_method(value: Any) -> Any:
    """What `value.save()` means in a block: the object's own method if it has one, else save()."""
    own = getattr(value, "save", None)
    return own() if callable(own) else save(value)


def name_cure(error: BaseException) -> None:
    """Say in the error of `x.save()`, of an object that has none, what to write instead.

    For blocks that run where they stand: there tensors can be lent the method, and what is of
    Python's own types can't.
    """
    if not isinstance(error, AttributeError) or error.name != "save" or len(error.args) != 1:
        return
    if type(error.obj).__module__ != "builtins" and not isinstance(error.obj, _CONTAINERS):
        return
    error.args = (
        f"{error.args[0]}: this block runs where it stands, and only tensors have .save() there. "
        f"Write tracekit.save(x), or leave it out: what a block binds is bound after it.",
    )


_CONTAINERS = (tuple, list, dict, set)
