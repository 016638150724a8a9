"""Whether the values of attention that a family declares can be read: no plain hook sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracekit import Model
from tracekit.architectures import names_of
from tracekit.errors import AttentionError, NeverRanError

_OF_ATTENTION = {
    f"{kind}{name}"
    for kind in ("", "cross_")
    for name in ("attn_q", "attn_k", "attn_v", "scores", "pattern")
}


def unreadable(net: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """The names of attention's own values that are declared, and can't be had in a trace."""
    names, model = names_of(net), Model(net)
    assert names is not None
    found: list[str] = []
    for owner in names.layers:
        for point in names.points(owner):
            if point.path in names.modules or point.name not in _OF_ATTENTION:
                continue
            try:
                with torch.no_grad(), model.trace(**inputs):
                    getattr(model.get(owner), point.name).clone()
            except (AttentionError, NeverRanError) as error:
                found.append(f"{owner} {point.name}: {error}")
    return found
