"""Notice that a captured tensor was overwritten in place, and is still in somebody's hands."""

from __future__ import annotations

from typing import Any, Final, Protocol, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tracekit.core.nest import is_fake, tensors

UNKNOWN: Final = -1


class Note(Protocol):
    """What is remembered of a tensor that was given out; holds none of its memory alive."""

    label: object
    storage: StorageWeakRef

    def renew(self) -> None:
        """Accept what is there now: it was changed on purpose."""
        ...

    def has_moved(self) -> bool:
        """Whether what was given out is no longer there, though somebody still uses the memory."""
        ...


@final
class Versions:
    """Tensors that were given out, and what they were then."""

    def __init__(self) -> None:
        self._notes: list[Note] = []

    def note(self, label: object, nest: Any) -> None:
        """Remember all tensors in `nest`."""
        for tensor in tensors(nest):
            if is_fake(tensor) and not tensor.is_inference():  # it counts, though it has no memory
                self._notes.append(_Counted(label, tensor))
            elif storage_key(tensor) is not None:
                kind = _Copied if tensor.is_inference() else _Counted
                self._notes.append(kind(label, tensor))

    def note_overwritten(self, label: object, nest: Any) -> None:
        """Remember tensors that are not what was given out, should somebody still hold them."""
        for tensor in tensors(nest):
            if storage_key(tensor) is not None:
                self._notes.append(_Overwritten(label, tensor))

    def renew(self, label: object) -> bool:
        """Accept changes of what was noted last, under `label`; whether there were any."""
        changed = False
        for note in reversed(self._notes):
            if note.label != label:
                break
            if note.has_moved():
                changed = True
                note.renew()
        return changed

    def overwritten(self) -> list[object]:
        """The labels of tensors that are still in use and no longer what was given out."""
        return [note.label for note in self._notes if note.has_moved()]

    def sharing(self, label: object) -> list[object]:
        """The other labels of tensors in the memory of what was noted under `label`."""
        own = {note.storage for note in self._notes if note.label == label}
        others = (note.label for note in self._notes if note.storage in own)
        return [other for other in dict.fromkeys(others) if other != label]


@final
class _Counted:
    """By the version counter, which all views of a tensor share."""

    __slots__ = ("_probe", "_version", "label", "storage")

    def __init__(self, label: object, tensor: Tensor) -> None:
        self.label = label
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self._probe = tensor.detach()  # shares the counter …
        self._probe.data = tensor.new_empty(0)  # … and not the memory
        self._version = tensor._version

    def renew(self) -> None:
        self._version = self._probe._version

    def has_moved(self) -> bool:
        return self._probe._version != self._version and not self.storage.expired()


@final
class _Overwritten:
    """What has been overwritten already."""

    __slots__ = ("label", "storage")

    def __init__(self, label: object, tensor: Tensor) -> None:
        self.label = label
        self.storage = StorageWeakRef(tensor.untyped_storage())

    def renew(self) -> None:
        pass

    def has_moved(self) -> bool:
        return not self.storage.expired()


@final
class _Copied:
    """By a copy: tensors made in inference mode count no versions."""

    __slots__ = ("_copy", "_offset", "_stride", "label", "storage")

    def __init__(self, label: object, tensor: Tensor) -> None:
        self.label = label
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self._offset, self._stride = tensor.storage_offset(), tensor.stride()
        self._copy = tensor.clone()

    def renew(self) -> None:
        now = self._now()
        if now is not None:
            self._copy = now.clone()

    def has_moved(self) -> bool:
        now = self._now()
        return now is not None and not torch.allclose(now, self._copy, 0, 0, equal_nan=True)

    def _now(self) -> Tensor | None:
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # pyright: ignore[reportPrivateUsage] - what StorageWeakRef is for
        if storage is None:
            return None
        now = self._copy.new_empty(0)
        return now.set_(storage, self._offset, self._copy.shape, self._stride)


def version(tensor: Tensor) -> int:
    """The version counter, or UNKNOWN for a tensor that keeps none, or no numbers."""
    return UNKNOWN if is_fake(tensor) else changes(tensor)


def changes(tensor: Tensor) -> int:
    """The version counter, of a fake tensor too; UNKNOWN for a tensor that keeps none."""
    return UNKNOWN if tensor.is_inference() else tensor._version


def storage_key(tensor: Tensor) -> int | None:
    """The same number for tensors that share memory; None where there is none to share."""
    if type(tensor) not in _WITH_STORAGE or tensor.layout is not torch.strided:
        return None  # fake, distributed, sparse: what they hold is not reached so
    return tensor.untyped_storage().data_ptr() or None


_WITH_STORAGE = (Tensor, torch.nn.Parameter)
