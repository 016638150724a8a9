"""The independent way: what plain PyTorch hooks see, and the state that nothing may change."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def small(activation: nn.Module | None = None) -> nn.Sequential:
    """Linear, activation, Linear, of width 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), activation or nn.ReLU(), nn.Linear(4, 4))


def stack(count: int = 3) -> nn.Sequential:
    """Linears of width 4."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def check_nothing_stays(net: nn.Module, run: Callable[[], list[Tensor]]) -> None:
    """Neither the first `run` on `net` nor a later one leaves a hook, or keeps what it gives."""
    before, refs = state_of(net), list[weakref.ref[Tensor]]()
    refs += map(weakref.ref, run())
    gc.disable()
    try:
        for _ in range(2):
            refs += map(weakref.ref, run())
        assert refs and all(ref() is None for ref in refs)
    finally:
        gc.enable()
    assert state_of(net) == before


def copied(value: Any) -> Any:
    """`value` with every tensor copied; what is no container of tensors is left out."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value]
    if hasattr(value, "items"):
        return {key: copied(item) for key, item in value.items()}
    return None


def is_same(kept: Any, plain: Any) -> bool:
    """Whether every tensor of `plain` (a value of copied()) is in `kept`, bit for bit."""
    if isinstance(plain, Tensor):
        same_kind = isinstance(kept, Tensor) and kept.dtype == plain.dtype
        return same_kind and kept.shape == plain.shape and _bits(kept) == _bits(plain)
    if isinstance(plain, list):
        pairs = zip(kept, plain, strict=True)
        return len(kept) == len(plain) and all(is_same(one, other) for one, other in pairs)
    if isinstance(plain, dict):
        return list(kept) == list(plain) and all(is_same(kept[key], plain[key]) for key in plain)
    return not isinstance(kept, Tensor)


def _bits(tensor: Tensor) -> bytes:
    fresh = tensor.detach().clone(memory_format=torch.contiguous_format)  # strides of its own
    return fresh.view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def plain_hooks(
    model: nn.Module, inputs: bool = False, name: str = "model"
) -> Iterator[dict[str, list[Any]]]:
    """The outputs (or the `(args, kwargs)`) of every module by path, in the order of execution."""
    seen: dict[str, list[Any]] = defaultdict(list)

    def output_hook(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen[path].append(copied(output))

    def input_hook(path: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen[path].append([copied(args), copied(kwargs)])

    handles: list[Any] = []
    for relative, module in model.named_modules():
        path = f"{name}.{relative}" if relative else name
        if inputs:
            handles.append(module.register_forward_pre_hook(input_hook(path), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_hook(path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changing(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """A plain forward hook that puts `change(output)` in the place of the output."""
    handle = module.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def state_of(model: nn.Module) -> list[Any]:
    """Every hook of every module, and what its instance has of its own."""
    return [
        (path, sorted(vars(module)), [list(getattr(module, name).items()) for name in HOOK_DICTS])
        for path, module in model.named_modules()
    ]
