"""Which layers are of a kind: by the modules they have, and by what their configuration says."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracekit.architectures.schema import Condition


def has(*paths: str) -> Condition:
    """Layers that have modules at all these paths."""

    def holds(layer: nn.Module, _config: Any) -> bool:
        modules = dict(layer.named_modules(remove_duplicate=False))
        return all(path in modules for path in paths)

    return holds


def says(**values: object) -> Condition:
    """Layers that have these attributes, or whose configuration has them."""

    def holds(layer: nn.Module, config: Any) -> bool:
        return all(
            getattr(layer, name, getattr(config, name, None)) == value
            for name, value in values.items()
        )

    return holds


def both(*conditions: Condition) -> Condition:
    """Layers that every one of these says yes to."""
    return lambda layer, config: all(each(layer, config) for each in conditions)


def otherwise(_layer: nn.Module, _config: Any) -> bool:
    """All layers that no kind before this one fits."""
    return True
