"""What a norm does, found out by trying a copy of it on numbers."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tracekit.core.quirks import own_children


class Norm(NamedTuple):
    """`gain * normed(x) + bias`; the gain is the weight, or the weight and one."""

    is_centring: bool  # takes the mean off first: LayerNorm, not RMSNorm
    neutral: float  # the weight that is no gain: 1, or for Gemma 0

    def gain(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType] - a norm that was tried
        return weight.detach().double() + (1 - self.neutral)


def norm_of(module: nn.Module, width: int) -> Norm | None:
    """What a norm of vectors of that width does; None if it is of no kind that is known here."""
    weight = getattr(module, "weight", None)
    known = {"weight", "bias"}
    names = {name for name, _ in module.named_parameters()}
    if own_children(module) or names - known or not isinstance(weight, nn.Parameter):
        return None
    return _tried(module, width) if weight.shape == (width,) else None


def width_of(module: nn.Module) -> int | None:
    """Of the vectors that a norm takes, as its weight has it; None if it has none."""
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) and weight.ndim == 1 else None


@torch.no_grad()
def _tried(module: nn.Module, width: int) -> Norm | None:
    norm = copy.deepcopy(module)
    if isinstance(getattr(norm, "bias", None), nn.Parameter):
        norm.bias.zero_()  # pyright: ignore[reportCallIssue]
    weight: Tensor = norm.weight  # pyright: ignore[reportAssignmentType]
    x = torch.sin(torch.arange(3 * width, dtype=torch.float32)).view(1, 3, width)
    x = x.to(weight.device, weight.dtype)

    def at(gain: Tensor | float, given: Tensor = x) -> Tensor:
        weight.copy_(torch.as_tensor(gain, dtype=weight.dtype).expand(width))
        return norm(given)

    zero, one = at(0.0), at(1.0)
    is_plain = not zero.any()
    normed = one if is_plain else zero
    gain = torch.linspace(-1, 2, width, dtype=weight.dtype, device=weight.device)
    is_linear = _same(at(gain), normed * (gain if is_plain else 1 + gain))
    if not is_linear:
        return None
    neutral = 1.0 if is_plain else 0.0
    return Norm(_same(at(neutral, x + 1), at(neutral)), neutral)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-3, atol=1e-3)
