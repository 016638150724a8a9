"""What tells the weights of one model from another's, also in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from tracekit.core.offload import brought
from tracekit.errors import LoadingError

_PARTS: Final = 64  # of each tensor, of which each has its own sum
_WHOLE_NUMBERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(module: nn.Module) -> str:
    """Tells one set of weights and buffers from another: any number that differs changes it.

    By names, shapes, dtypes, and exact sums of the bits of each part. LoadingError for weights that
    are not in memory, and that nothing brings there.
    """
    found = hashlib.sha256()
    for name, weight in _named(module):
        held = brought(module, name) if weight.is_meta else weight.detach()
        if held is None:
            raise LoadingError(
                f"{name} is not in memory, and nothing is there to bring it: which weights these "
                f"are can't be told. Load the model first."
            )
        told = (name, tuple(weight.shape), str(weight.dtype), _sums(held))
        found.update(repr(told).encode())
    return found.hexdigest()


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _sums(tensor: Tensor) -> list[Any]:
    """The sums of the bits of each part, read as whole numbers: exact, and quick on any device."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # quantised: what it consists of
        return [_sums(getattr(tensor, name)) for name in flatten()[0]]
    bits = tensor.contiguous().reshape(-1).view(_WHOLE_NUMBERS[tensor.element_size()])
    size = len(bits) // _PARTS
    parts = bits[: size * _PARTS].view(_PARTS, size).sum(1, dtype=torch.int64)
    return [*parts.tolist(), int(bits[size * _PARTS :].sum(dtype=torch.int64))]
