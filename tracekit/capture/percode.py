"""Remember one value per code object, no longer than the code object lives."""

from __future__ import annotations

import weakref
from types import CodeType
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class PerCode(Generic[T]):
    """One value per code object, by identity, forgotten with the code object.

    Equal code objects of two files, or of two runs of a notebook cell, are different places, and
    `==` does not see the file; so the key is the identity, and a weak reference guards it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[CodeType], T]] = {}

    def get(self, code: CodeType) -> T | None:
        entry = self._entries.get(id(code))
        return entry[1] if entry is not None and entry[0]() is code else None

    def put(self, code: CodeType, value: T) -> None:
        """Remember `value`, which must not refer to `code` itself (it would then stay for ever)."""
        key, entries = id(code), self._entries
        entries[key] = weakref.ref(code, lambda _: entries.pop(key, None)), value

    def __len__(self) -> int:
        return len(self._entries)
