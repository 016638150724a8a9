"""What is hard to show: tags, spaces and line breaks as tokens, and what is no number."""

from __future__ import annotations

import torch

from tracekit.analysis import Axis, Labelled

TOKENS = ("<bos>", " Eiffel", "\n", "<script>alert(1)</script>", " & \"'", "\x1b[31m", "日本")


def heat() -> Labelled:
    """Layers by positions, with both signs, one nan and one inf."""
    values = torch.linspace(-1.25, 3.0, 21).reshape(3, 7)
    values[1, 2], values[2, 6] = float("nan"), float("inf")
    layers = Axis("layer", ("0", "1", "2"))
    return Labelled(values, [layers, Axis("position", TOKENS)], "logit of 'Paris'")


def heads() -> Labelled:
    """Layers by positions by heads, none negative."""
    values = torch.arange(3 * 7 * 2).reshape(3, 7, 2) / 42
    axes = [Axis("layer", ("0", "1", "2")), Axis("position", TOKENS), Axis("head", ("0", "1"))]
    return Labelled(values, axes, "share")
