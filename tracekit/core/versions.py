"""Notice that a captured tensor was overwritten in place, and is still in somebody's hands."""

from __future__ import annotations

import gc
import sys
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

    def has_changed(self) -> bool:
        """Whether it was changed, as far as that is known; also if nobody uses it any more."""
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

    def note_uncounted(self, label: object, nest: Any) -> None:
        """Remember those tensors in `nest` whose changes nothing counts."""
        self.note(label, [tensor for tensor in tensors(nest) if tensor.is_inference()])

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
        """The labels of tensors that somebody still holds and that are not what was given out."""
        moved = [note for note in self._notes if note.has_moved()]
        held = storages_in_hands() if moved else set[int]()
        return [note.label for note in moved if note.storage.cdata in held]

    def changed(self, apart_from: Any = ()) -> list[object]:
        """The labels of tensors that were changed since, held or not; that is accepted then.

        Those in the memory of tensors in `apart_from` are left out.
        """
        own = {StorageWeakRef(t.untyped_storage()) for t in tensors(apart_from) if storage_key(t)}
        moved = [note for note in self._notes if note.has_changed()]
        for note in moved:
            note.renew()
        return [note.label for note in moved if note.storage not in own]

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
        self._probe = counter(tensor)
        self._version = tensor._version

    def renew(self) -> None:
        self._version = self._probe._version

    def has_moved(self) -> bool:
        return self.has_changed() and not self.storage.expired()

    def has_changed(self) -> bool:
        return self._probe._version != self._version


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

    def has_changed(self) -> bool:
        return True


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

    def has_changed(self) -> bool:
        return self.has_moved()

    def _now(self) -> Tensor | None:
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # pyright: ignore[reportPrivateUsage] - what StorageWeakRef is for
        if storage is None:
            return None
        now = self._copy.new_empty(0)
        return now.set_(storage, self._offset, self._copy.shape, self._stride)


def storages_in_hands() -> set[int]:
    """The memory of every tensor that Python holds; what a backward pass alone keeps is not in it.

    It looks at all objects there are, so it is for when something was overwritten.
    """
    found: set[int] = set()
    is_counted, of_this_loop = is_a_graph_counted(), _references_of_a_loop()
    for each in gc.get_objects():
        if not issubclass(type(each), (Tensor, torch.UntypedStorage)):  # isinstance asks proxies
            continue
        below = 1 if is_counted and _is_used_below(each) else 0
        if sys.getrefcount(each) <= of_this_loop + below:
            continue
        try:
            storage = each if type(each) is torch.UntypedStorage else each.untyped_storage()
            found.add(StorageWeakRef(storage).cdata)
        except (RuntimeError, NotImplementedError):  # no memory that could be shared
            continue
    return found


def _references_of_a_loop() -> int:
    """What a loop like the one above counts for what nobody else has: 3, or less (3.14)."""
    for each in [object()]:
        return sys.getrefcount(each)
    raise AssertionError


def _is_used_below(held: Any) -> bool:
    """Whether something that is not written in Python has `held`, too."""
    if isinstance(held, Tensor):
        return held._use_count() > 1  # pyright: ignore[reportAttributeAccessIssue] - since torch 2.10
    return torch._C._storage_Use_Count(held._cdata) > 1  # pyright: ignore


def is_a_graph_counted() -> bool:
    """Whether a tensor that a graph keeps has one reference more for that (since torch 2.10).

    Before, a tensor that only a graph keeps looks as if somebody had it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        factor = torch.ones(1)
        before = sys.getrefcount(factor)
        product = factor * torch.ones(1, requires_grad=True)
        return hasattr(product, "_use_count") and sys.getrefcount(factor) == before + 1


def version(tensor: Tensor) -> int:
    """The version counter, or UNKNOWN for a tensor that keeps none, or no numbers."""
    is_numberless = type(tensor) is not Tensor and is_fake(tensor)
    return UNKNOWN if is_numberless else changes(tensor)


def counter(tensor: Tensor) -> Tensor:
    """A tensor that has the version counter of `tensor`, and holds none of its memory."""
    probe = tensor.detach()
    probe.data = tensor.new_empty(0)
    return probe


def changes(tensor: Tensor) -> int:
    """The version counter, of a fake tensor too; UNKNOWN for a tensor that keeps none."""
    try:
        return tensor._version
    except RuntimeError:  # it was made in inference mode; to ask first would cost as much again
        return UNKNOWN


def storage_key(tensor: Tensor) -> int | None:
    """The same number for tensors that share memory; None where there is none to share."""
    if type(tensor) not in _WITH_STORAGE or tensor.layout is not torch.strided:
        return None  # fake, distributed, sparse: what they hold is not reached so
    return tensor.untyped_storage().data_ptr() or None


_WITH_STORAGE = (Tensor, torch.nn.Parameter)
