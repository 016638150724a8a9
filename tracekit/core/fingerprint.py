"""What tells the weights of one model from another's."""

from __future__ import annotations

import hashlib
from typing import Final

from torch import nn

_SAMPLE: Final = 8  # numbers of each weight


def fingerprint(module: nn.Module) -> str:
    """Tells one set of weights from another: names, shapes, dtypes, and some numbers of each."""
    found = hashlib.sha256()
    for name, weight in module.named_parameters():
        numbers = [] if weight.is_meta else weight.detach().reshape(-1)[:_SAMPLE].float().tolist()
        found.update(repr((name, tuple(weight.shape), str(weight.dtype), numbers)).encode())
    return found.hexdigest()
