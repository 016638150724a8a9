"""Tensors as bytes: what of one travels, and how one is changed in place to be like another."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

# shape, dtype, order of its axes in memory, bytes, whether it was with the model, kind, gradient
Dumped = tuple[Any, ...]
_PLAIN: Final = (Tensor, nn.Parameter)


def dump(tensor: Tensor, is_with_model: bool) -> Dumped | None:
    """A plain tensor, on the CPU and without its history; None for any other kind of tensor."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    kind = (isinstance(tensor, nn.Parameter), tensor.requires_grad and tensor.is_leaf)
    if tensor.is_meta:
        return shape, dtype, None, None, is_with_model, kind, None
    order, data = _bytes_of(tensor.detach())
    grad = dump(tensor.grad, is_with_model) if tensor.is_leaf and tensor.grad is not None else None
    return shape, dtype, order, data, is_with_model, kind, grad


def _bytes_of(tensor: Tensor) -> tuple[list[int] | None, Any]:
    """The order of the axes in memory (None: as they stand), and a buffer that shares memory.

    As it lies in memory, where nothing is left out: a product may round otherwise else.
    """
    plain = tensor.resolve_conj().resolve_neg().cpu()
    order = sorted(range(plain.dim()), key=lambda axis: -plain.stride(axis))
    dense = plain.permute(order)
    if not dense.is_contiguous():
        order, dense = None, plain.contiguous()
    if not dense.numel():
        return order, pickle.PickleBuffer(b"")
    data: Any = dense.reshape(-1).view(torch.uint8).numpy()
    return order, pickle.PickleBuffer(data)


def load(dumped: Dumped, device: torch.device) -> Tensor:
    """The tensor; on `device` if it was with the model, else on the CPU."""
    shape, dtype, order, data, is_with_model, kind, grad = dumped
    is_parameter, requires_grad = kind
    tensor = _made(shape, getattr(torch, dtype), order, data)
    if is_with_model and data is not None:
        tensor = tensor.to(device)
    if is_parameter:
        tensor = nn.Parameter(tensor, requires_grad)
    elif requires_grad:
        tensor.requires_grad_(True)
    if grad is not None:
        tensor.grad = load(grad, device)
    return tensor


def _made(shape: Sequence[int], dtype: torch.dtype, order: Any, data: Any) -> Tensor:
    if data is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    view = memoryview(data)
    if not view.nbytes:
        return torch.empty(shape, dtype=dtype)
    if view.readonly:
        view = memoryview(bytearray(view))
    flat = torch.frombuffer(view, dtype=torch.uint8).view(dtype)
    if order is None:
        return flat.reshape(shape)
    dense = flat.reshape([shape[axis] for axis in order])
    return dense.permute([order.index(axis) for axis in range(len(order))])


def state_of(tensor: Tensor) -> object:
    """Differs once the tensor or its gradient was changed."""
    grad = tensor.grad if tensor.is_leaf else None
    own = () if tensor.is_inference() else (tensor._version,)
    brought = None if grad is None else (id(grad), grad._version)
    where = 0 if tensor.is_meta or tensor.layout is not torch.strided else tensor.data_ptr()
    return *own, where, tuple(tensor.shape), tensor.requires_grad, brought


def change(mine: Tensor, dumped: Any) -> None:
    """Give `mine` the numbers and the gradient of what was dumped."""
    theirs = dumped if isinstance(dumped, Tensor) else load(dumped, mine.device)
    with torch.no_grad():
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            mine.data = theirs.data.to(mine.device)
        else:
            mine.copy_(theirs)
    if mine.is_leaf and mine.requires_grad:
        mine.grad = None if theirs.grad is None else theirs.grad.to(mine.device)
