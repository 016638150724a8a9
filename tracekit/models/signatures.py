"""Which arguments a module's forward takes; asked in every trace, so remembered by function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name."""
    function = getattr(module.forward, "__func__", module.forward)
    return name in parameters(function)


@lru_cache(maxsize=64)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments of `function`."""
    return frozenset(inspect.signature(function).parameters)
