"""What a recorder keeps of a value: tensors detached, moved and cast, and notes of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from tracekit.core.nest import Nest, is_fake, map_leaves

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    slice,
)


@final
@dataclass(frozen=True)
class Note:
    """In the place of an object that is not kept: its type and, for a kv_cache, its length then.

    A live cache of keys and values is one object that every step changes; keeping it would show
    the last step's state in all of them, and hold all keys and values alive.
    """

    type: str
    length: int | None = None  # positions


class Outbox(Protocol):
    """Whoever moves tensors to the device later."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether `tensor` can wait where it is."""
        ...

    def take(self, tensor: Tensor) -> Tensor:
        """What is kept of it for now: itself, or a copy on the device if it can't wait."""
        ...


@final
@dataclass(frozen=True)
class Keep:
    """How values are kept; `device=None` leaves a tensor where it is, `dtype=None` as it is.

    `dtype` casts floating-point tensors; integers, booleans and complex numbers stay what they
    are. With an `outbox`, tensors of other devices are kept there until it moves them.
    """

    device: torch.device | None
    dtype: torch.dtype | None
    detach: bool
    clone: bool
    outbox: Outbox | None = None

    def __call__(self, value: Nest) -> Nest:
        """`value` as it is kept."""
        return map_leaves(self._leaf, value)

    def shares(self, tensor: Tensor) -> bool:
        """Whether what is kept of `tensor` shares its memory."""
        if self.clone or not self.detach or tensor.is_inference():
            return not self.detach and not self.clone
        is_away = self.device is not None and tensor.device != self.device
        if is_away and (self.outbox is None or not self.outbox.takes(tensor)):
            return False
        return self.dtype in (None, tensor.dtype) or not tensor.is_floating_point()

    def tensor(self, tensor: Tensor) -> Tensor:
        """One tensor as it is kept; `shares` says whether in its memory."""
        kept = tensor.detach() if self.detach else tensor
        if self.device is not None and kept.device != self.device:
            kept = kept.to(self.device) if self.outbox is None else self.outbox.take(kept)
        if self.dtype is not None and kept.is_floating_point():
            kept = kept.to(self.dtype)
        # inference tensors keep no version, so nobody could notice that one was overwritten
        if (self.clone or tensor.is_inference()) and _is_shared(kept, tensor):
            kept = kept.clone()
        return kept

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self.tensor(leaf)
        return leaf if isinstance(leaf, _PLAIN) else note(leaf)


def _is_shared(kept: Tensor, tensor: Tensor) -> bool:
    return not is_fake(tensor) and kept.data_ptr() == tensor.data_ptr()


def note(value: object) -> Note:
    """A Note of an object that is not kept."""
    length = getattr(value, "get_seq_length", None)
    if callable(length) and not isinstance(value, Mapping):
        try:
            return Note(type(value).__name__, int(length()))  # pyright: ignore[reportArgumentType] - an int, or a 0-d tensor for static caches
        except (ValueError, TypeError):  # a cache of linear-attention states alone has no length
            return Note(type(value).__name__)
    return Note(type(value).__name__)
