"""The torch state that belongs to a thread, carried from the user's thread to a worker's."""

from __future__ import annotations

import contextvars
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, final

import torch
from torch.overrides import _get_current_function_mode_stack  # pyright: ignore[reportPrivateUsage]
from torch.utils import _python_dispatch

# torch gives no public way to list the modes of a thread; without them a default device, a
# FakeTensorMode or a user's own mode would be lost in the block, silently.
_function_stack: Any = torch.overrides
_dispatch_stack: Any = _python_dispatch


@final
class TorchState:
    """A snapshot of: grad and inference mode, autocast, function and dispatch modes (the default
    device is one), the CUDA device and stream, and the context variables."""

    def __init__(self) -> None:
        self.context = contextvars.copy_context()
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._function_modes: list[Any] = list(_get_current_function_mode_stack())
        self._dispatch_modes: list[Any] = list(_dispatch_stack._get_current_dispatch_mode_stack())
        self._autocast = [_autocast(device) for device in _autocast_devices()]
        self._cuda = _cuda_place() if torch.cuda.is_initialized() else None

    @contextmanager
    def adopted(self, grad: bool | None = None) -> Generator[None]:
        """Run the `with` block under this state; `grad` overrides its grad mode."""
        enabled = self._grad if grad is None else grad
        with ExitStack() as stack:
            if self._cuda is not None:
                stack.enter_context(torch.cuda.device(self._cuda[0]))
                stack.enter_context(torch.cuda.stream(self._cuda[1]))
            for device, dtype in filter(None, self._autocast):
                stack.enter_context(torch.autocast(device, dtype=dtype))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            if enabled != torch.is_grad_enabled():
                stack.enter_context(torch.set_grad_enabled(enabled))
            for mode in self._function_modes:
                _function_stack._push_mode(mode)
                stack.callback(_function_stack._pop_mode)
            for mode in self._dispatch_modes:
                _dispatch_stack._push_mode(mode)
                stack.callback(_dispatch_stack._pop_mode)
            yield


def grad_mode(grad: bool | None) -> AbstractContextManager[object]:
    """`with` it, gradients are on or off as `grad` says, or as they are."""
    return nullcontext() if grad is None else torch.set_grad_enabled(grad)


def _autocast_devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)


def _autocast(device: str) -> tuple[str, torch.dtype] | None:
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


def _cuda_place() -> tuple[int, Any]:
    return torch.cuda.current_device(), torch.cuda.current_stream()
