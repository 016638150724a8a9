"""Tensors on their way into one file: each piece of memory once, those that look alike as rows."""

# A tensor is kept as it lies in memory, so that others of the same memory are views of it, and
# come back so: reshaped, transposed, expanded. What leaves memory out between its numbers (a slice)
# is written by itself, and comes back without the gaps.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tracekit.core.nest import is_fake
from tracekit.core.versions import version

# What files of safetensors have a name for; other dtypes are written as one of these.
_WRITTEN: Final = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    }
)


class Place(NamedTuple):
    """Where a tensor lies: in which part of a cache, which stack of it, and which row of that."""

    part: int
    stack: int
    row: int


class _Dense(NamedTuple):
    """The memory of a tensor, and how the tensor is made of it."""

    memory: Tensor  # without gaps, in the order in which it lies
    stride: tuple[int, ...]
    key: tuple[Any, ...]  # the same for tensors of the same numbers in one storage


class _Known(NamedTuple):
    """Memory that was written before."""

    storage: StorageWeakRef
    version: int
    place: Place
    shape: torch.Size


@final
class Shelf:
    """The tensors of one part after the other; `nbytes` and `names` are of the current one."""

    def __init__(self) -> None:
        self.part = 0
        self.nbytes = 0
        self.names: list[str] = []
        self._stacks: list[list[Tensor]] = []
        self._by_look: dict[tuple[Any, ...], int] = {}
        self._known: dict[tuple[Any, ...], _Known] = {}

    def put(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """What stands for `tensor` in JSON; TypeError, which says why, if it can't be written."""
        _check(tensor)
        plain = tensor.detach().resolve_conj().resolve_neg()
        dense = _dense(plain)
        place, shape = self._place(name, plain, dense)
        told: dict[str, Any] = {"tensor": list(place[1:])}
        if place.part != self.part:
            told["part"] = place.part
        if shape != plain.shape or dense.stride != _strides(plain.shape):
            told["view"] = [list(plain.shape), list(dense.stride)]
        if plain.dtype not in _WRITTEN:
            told["dtype"] = str(plain.dtype).removeprefix("torch.")
        if isinstance(tensor, nn.Parameter):
            told["parameter"] = tensor.requires_grad
        return told

    def tensors(self) -> dict[str, Tensor]:
        """The stacks of the current part by name: `[rows, …]` each, in memory of its own."""
        found: dict[str, Tensor] = {}
        taken: set[int] = set()  # files of safetensors refuse tensors that share memory
        for name, rows in zip(self.names, self._stacks, strict=True):
            if len(rows) > 1:
                found[name] = torch.stack([row.cpu() for row in rows])
                continue
            memory = rows[0].untyped_storage().data_ptr()
            found[name] = (rows[0].clone() if memory in taken else rows[0])[None]
            taken.add(memory)
        return found

    def clear(self) -> None:
        """Begin with the next part, and hold nothing."""
        self.part += 1
        self.nbytes = 0
        self.names, self._stacks, self._by_look = [], [], {}
        self._known = {key: one for key, one in self._known.items() if not one.storage.expired()}

    def _place(self, name: str, tensor: Tensor, dense: _Dense) -> tuple[Place, torch.Size]:
        storage, shape = tensor.untyped_storage(), dense.memory.shape
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.dtype, dense.key)
        known = self._known.get(key) if tensor.numel() else None
        now = version(tensor)
        if known is not None and known.version == now and not known.storage.expired():
            is_certain = now >= 0 or known.place.part == self.part  # else nobody counts versions
            if is_certain:
                return known.place, known.shape
        place = self._add(name, dense.memory)
        self._known[key] = _Known(StorageWeakRef(storage), now, place, shape)
        return place, shape

    def _add(self, name: str, memory: Tensor) -> Place:
        memory = memory.as_strided(memory.shape, _strides(memory.shape))  # also of one number
        written = _as_written(memory)
        look = (name, written.shape, written.dtype)
        stack = self._by_look.get(look)
        if stack is None:
            stack = self._by_look[look] = len(self.names)
            self.names.append(self._free(name))
            self._stacks.append([])
        self._stacks[stack].append(written)
        self.nbytes += written.nbytes
        return Place(self.part, stack, len(self._stacks[stack]) - 1)

    def _free(self, name: str) -> str:
        """`name`, with a number where tensors of another look have it."""
        taken = set(self.names)
        number = 2
        free = name
        while free in taken:
            free, number = f"{name}#{number}", number + 1
        return free


def restored(told: dict[str, Any], memory: Tensor) -> Tensor:
    """The tensor that `told`, as `Shelf.put` made it, says of the memory that it is in."""
    dtype = getattr(torch, told["dtype"]) if "dtype" in told else memory.dtype
    if dtype.is_complex:
        memory = torch.view_as_complex(memory)
    elif dtype != memory.dtype:
        memory = memory.view(dtype)
    if "view" in told:
        memory = memory.as_strided(*told["view"])
    return nn.Parameter(memory, told["parameter"]) if "parameter" in told else memory


def _check(tensor: Tensor) -> None:
    if is_fake(tensor) or tensor.is_meta:
        raise TypeError("it has no numbers: it is of a dry run, or on meta")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError("make a plain tensor of it, with .as_subclass(torch.Tensor)")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"it is {kind}: make it dense, with .to_dense() or .dequantize()")
    is_written = tensor.dtype in _WRITTEN or tensor.dtype.is_complex or tensor.dtype.itemsize == 1
    if not is_written:
        raise TypeError(f"files of safetensors have no {tensor.dtype}")


def _as_written(memory: Tensor) -> Tensor:
    if memory.dtype.is_complex:
        return torch.view_as_real(memory)
    return memory if memory.dtype in _WRITTEN else memory.view(torch.uint8)


def _dense(tensor: Tensor) -> _Dense:
    """The memory of `tensor`: without the axes along which it repeats, sorted by stride."""
    usual = _strides(tensor.shape)
    if tensor.is_contiguous():
        return _Dense(tensor, usual, (tensor.numel(),))
    core = tensor
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            core = core.narrow(axis, 0, 1)
    order = sorted(range(core.dim()), key=lambda axis: -core.stride(axis))
    memory, key = core.permute(order), (core.numel(),)
    strides = core.stride()
    if not memory.is_contiguous():
        memory, key = core.contiguous(), (*core.shape, *core.stride())
        strides = memory.stride()
    repeats = [own != all for own, all in zip(core.shape, tensor.shape, strict=True)]
    strides = tuple(0 if again else each for again, each in zip(repeats, strides, strict=True))
    return _Dense(memory, strides, key)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# Gives the memory at a place.
Find = Callable[[Place], Tensor]
