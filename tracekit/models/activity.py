"""What each module gave in one run: the shape of it, how large it was, and what is no number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tracekit.core.nest import first_tensor
from tracekit.errors import TracekitError
from tracekit.models.model import Model
from tracekit.tracing.cache import Cache


@final
@dataclass(frozen=True)
class Activity:
    """The first tensor that a module gave, in its first call; `calls` says how many there were.

    `mean`, `std` and `rms` (the root of the mean square) are over its finite numbers, `largest`
    (of absolute values) counts infinite ones too; nan where there are none such, None of integers
    and of empty tensors. `nans` are how many are no number.
    """

    shape: tuple[int, ...]
    dtype: str
    calls: int
    mean: float | None = None
    std: float | None = None
    rms: float | None = None
    largest: float | None = None
    nans: int = 0

    def to_json(self) -> dict[str, Any]:
        """What it holds, as a dictionary."""
        return {**vars(self), "shape": list(self.shape)}


def activity(model: Model, *args: Any, **kwargs: Any) -> dict[str, Activity]:
    """By path, what each module that ran gave in `model.trace(...)`; without gradients."""
    with torch.no_grad(), model.trace(*args, **kwargs) as tracer:
        cache = tracer.cache(device=None)
    found = {path: activity_in(cache, path) for path in cache}
    return {path: each for path, each in found.items() if each is not None}


def activity_in(cache: Cache, path: str) -> Activity | None:
    """What the module at a path gave; None if that, or a tensor in it, was not recorded."""
    entries = cache.get(path)
    try:
        tensor = first_tensor(entries[0].output) if entries else None
    except TracekitError:  # no outputs were recorded
        return None
    return None if tensor is None else _of(tensor, len(entries or ()))


def _of(tensor: Tensor, calls: int) -> Activity:
    dtype = str(tensor.dtype).removeprefix("torch.")
    about = (tuple(tensor.shape), dtype, calls)
    if not tensor.is_floating_point() or not tensor.numel():
        return Activity(*about)
    numbers = tensor.detach()
    numbers = numbers.double() if tensor.device.type != "mps" else numbers.float()
    finite, some = numbers[numbers.isfinite()], numbers[~numbers.isnan()]
    mean = finite.mean()
    std, rms = ((finite - part).square().mean().sqrt() for part in (mean, 0.0))
    largest = some.abs().max().item() if some.numel() else math.nan
    nans = numbers.numel() - some.numel()
    return Activity(*about, mean.item(), std.item(), rms.item(), largest, nans)
