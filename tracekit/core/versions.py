"""Notice that a captured tensor was overwritten in place, by autograd's version counter."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from tracekit.core.nest import tensors


@dataclass(slots=True)
class _Note:
    label: object
    tensor: weakref.ref[Tensor]
    version: int


@final
class Versions:
    """Tensors that were given out, each with its version then; holds none of them alive."""

    def __init__(self) -> None:
        self._notes: list[_Note] = []

    def note(self, label: object, nest: Any) -> None:
        """Remember the versions of all tensors in `nest`."""
        for tensor in tensors(nest):
            if not tensor.is_inference():  # inference tensors count no versions
                self._notes.append(_Note(label, weakref.ref(tensor), tensor._version))

    def renew(self, label: object) -> None:
        """Accept the present versions of what was noted last, under `label`: changed on purpose."""
        for note in reversed(self._notes):
            if note.label != label:
                return
            tensor = note.tensor()
            if tensor is not None:
                note.version = tensor._version

    def overwritten(self) -> list[object]:
        """The labels of tensors that are still in use and no longer what was given out."""
        return [note.label for note in self._notes if _has_moved(note)]


def version(tensor: Tensor) -> int:
    """The version counter, or -1 for a tensor that keeps none."""
    return -1 if tensor.is_inference() else tensor._version


def _has_moved(note: _Note) -> bool:
    tensor = note.tensor()
    return tensor is not None and tensor._version != note.version


def storage_key(tensor: Tensor) -> int | None:
    """The same number for all tensors that share memory; None where there is no memory to share."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, fake and other storage-less tensors
        return None
