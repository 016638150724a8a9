"""Weights drawn anew where all are alike: a norm of ones and a bias of zeros prove little."""

from __future__ import annotations

import torch
from torch import nn


def stirred(net: nn.Module, seed: int = 0) -> nn.Module:
    """`net`, with noise on each parameter that has one value in all places, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net
