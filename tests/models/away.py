"""Models whose weights are elsewhere, as accelerate keeps them, and memory that tells on itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from tests.tracing.plain import state_of

WAYS = ["disk", "cpu", "mixed"]


def put_away(net: Any, way: str, folder: Path, layers: tuple[str, ...] = ()) -> Any:
    """`net`, its weights on the disk, on the CPU to be brought, or every other layer away."""
    if way == "disk":
        accelerate.disk_offload(net, folder, execution_device=torch.device("cpu"))
    elif way == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(net, dict(_mixed(net, layers)), offload_dir=folder)
    assert any(weight.is_meta for weight in net.parameters())
    return net


def _mixed(net: nn.Module, layers: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for path, module in net.named_modules():
        around = [layer for layer in layers if f"{layer}.".startswith(f"{path}." if path else "")]
        if path in layers:
            yield path, "disk" if layers.index(path) % 2 == 0 else "cpu"
        elif around:
            own = [*module._parameters, *module._buffers]
            yield from ((f"{path}.{name}".lstrip("."), "cpu") for name in own)
            for name, _ in module.named_children():
                below = f"{path}.{name}".lstrip(".")
                if not any(f"{layer}.".startswith(f"{below}.") for layer in layers):
                    yield below, "cpu"


def whereabouts(net: nn.Module) -> tuple[list[Any], dict[str, torch.device], list[Any]]:
    """What a run has to leave as it was: hooks, forwards, accelerate's hooks, where weights are."""
    named = net.named_parameters(remove_duplicate=False)
    forwards = [(vars(m).get("forward"), vars(m).get("_hf_hook")) for m in net.modules()]
    return state_of(net), {name: weight.device for name, weight in named}, forwards


@contextmanager
def empty_memory_is_nan() -> Iterator[None]:
    """Memory that was never written is not a number, so that whoever reads it can't miss it."""
    was = torch.are_deterministic_algorithms_enabled()
    was_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=was_only)
