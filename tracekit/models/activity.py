"""What each module gave in one run: the shape of it, and how large it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tracekit.core.nest import first_tensor
from tracekit.models.model import Model


@final
@dataclass(frozen=True)
class Activity:
    """The first tensor that a module gave, in its first call; `calls` says how many there were.

    `mean`, `rms` (the root of the mean square) and `largest` (of absolute values) are over all its
    numbers; None of integers, and where there are none.
    """

    shape: tuple[int, ...]
    dtype: str
    calls: int
    mean: float | None = None
    rms: float | None = None
    largest: float | None = None

    def to_json(self) -> dict[str, Any]:
        """What it holds, as a dictionary."""
        return {**vars(self), "shape": list(self.shape)}


def activity(model: Model, *args: Any, **kwargs: Any) -> dict[str, Activity]:
    """By path, what each module that ran gave in `model.trace(...)`; without gradients."""
    with torch.no_grad(), model.trace(*args, **kwargs) as tracer:
        cache = tracer.cache(device=None)
    found: dict[str, Activity] = {}
    for path, entries in cache.items():
        tensor = first_tensor(entries[0].output)
        if tensor is not None:
            found[path] = _of(tensor, len(entries))
    return found


def _of(tensor: Tensor, calls: int) -> Activity:
    about = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), calls)
    if not tensor.is_floating_point() or not tensor.numel():
        return Activity(*about)
    numbers = tensor.double() if tensor.device.type != "mps" else tensor.float()
    sizes = (numbers.mean(), numbers.square().mean().sqrt(), numbers.abs().max())
    return Activity(*about, *(each.item() for each in sizes))
