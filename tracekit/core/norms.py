"""What a norm computes, told by its numbers: does it centre, and how does it use its weight."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from tracekit.core.nest import is_fake
from tracekit.core.offload import at_hand

_EPSILONS: Final = ("eps", "variance_epsilon", "epsilon", "norm_eps")
_WIDE: Final = (torch.float32, torch.float64)


@final
@dataclass(frozen=True)
class NormKind:
    """`affine((x - mean, if it centers) / scale)`, with `offset` added to the weight (Gemma: 1)."""

    centers: bool
    offset: float

    @property
    def neutral(self) -> float:
        """The weight that is no gain: 1, or for Gemma 0."""
        return 1 - self.offset

    def gain(self, module: nn.Module) -> Tensor:
        """What the norm multiplies the normalized values by, in float64."""
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType] - a norm of this kind
        return weight.detach().double() + self.offset

    def centered(self, x: Tensor) -> Tensor:
        """What is divided by the scale, in float32 at least."""
        wide = x if x.dtype in _WIDE else x.float()
        return wide - wide.mean(-1, keepdim=True) if self.centers else wide

    def scale(self, module: nn.Module, centered: Tensor) -> Tensor:
        """`[..., 1]`: the root of the mean square."""
        return _scale(centered, epsilon_of(module))

    def affine(self, module: Any, normalized: Tensor) -> Tensor:
        """What the norm makes of the normalized values."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            normalized = normalized * (weight + self.offset if self.offset else weight)
        return normalized if bias is None else normalized + bias


def kind_of(module: nn.Module, x: Tensor, output: object) -> NormKind | None:
    """The kind that gives `output` for `x`; None if there is none."""
    if not isinstance(output, Tensor) or output.shape != x.shape or not x.is_floating_point():
        return None
    if is_fake(output):  # a dry run asks for shapes, which are those of every kind
        return NormKind(centers=True, offset=0.0)
    tolerance = 1e-4 if output.dtype in _WIDE else 3e-2
    with torch.no_grad():
        for centers, offset in product((True, False), (0.0, 1.0)):
            kind = NormKind(centers, offset)
            centered = kind.centered(x)
            try:
                made = kind.affine(module, centered / kind.scale(module, centered))
            except RuntimeError:  # a weight of another shape
                return None
            if torch.allclose(made, output.to(made.dtype), rtol=tolerance, atol=tolerance):
                return kind
    return None


@final
@dataclass(frozen=True)
class Inside:
    """What a norm of a kind divides by, or what it has divided, out of its input."""

    kind: NormKind
    epsilon: float
    is_scale: bool

    def __call__(self, x: Tensor) -> Tensor:
        centered = self.kind.centered(x)
        scale = _scale(centered, self.epsilon)
        return scale if self.is_scale else centered / scale


def _scale(centered: Tensor, epsilon: float) -> Tensor:
    return (centered.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def may_be_norm(module: Any) -> bool:
    """Whether it calls itself one; where there are no numbers."""
    weight = getattr(module, "weight", None)
    is_empty = isinstance(weight, Tensor) and (weight.is_meta or is_fake(weight))
    return is_empty and "norm" in type(module).__name__.lower()


def known_kind(module: Any) -> NormKind | None:
    """The kind that its numbers, of some input, are of; None if they are those of no norm."""
    module = at_hand(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not _has_epsilon(module):
        return None
    if weight.is_meta or is_fake(weight):
        return None
    count = 3 * weight.shape[0]
    x = torch.linspace(-1, 2, count, device=weight.device).sin().add(0.3)
    x = x.view(1, 3, -1).to(weight.dtype)
    with torch.no_grad():
        try:
            return kind_of(module, x, type(module).forward(module, x))
        except (RuntimeError, TypeError):  # it takes something else: a gate, for one
            return None


def _has_epsilon(module: Any) -> bool:
    return any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)


def epsilon_of(module: Any) -> float:
    """What a norm adds to the mean square."""
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((each for each in found if isinstance(each, float)), 0.0)
