"""Which arguments a module's forward and its `generate` take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name."""
    return name in arguments(module)  # asked in every trace, so remembered by function


def arguments(module: nn.Module) -> frozenset[str]:
    """The names of the arguments of the module's forward."""
    return parameters(getattr(module.forward, "__func__", module.forward))


@lru_cache(maxsize=64)
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the arguments of `function`."""
    return frozenset(inspect.signature(function).parameters)


def takes_input(module: nn.Module) -> bool:
    """Whether the module's forward has an argument at all."""
    return bool(inspect.signature(module.forward).parameters)


def is_transformers(module: Any) -> bool:
    """Whether its `generate` is that of transformers, with all its arguments."""
    return any(kind.__name__ == "GenerationMixin" for kind in type(module).__mro__)


def owner_of_generate(module: Any) -> str:
    """The name of the class whose `generate` it has: "GenerationMixin" for that of all models."""
    return next(kind for kind in type(module).__mro__ if "generate" in vars(kind)).__name__


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of `module.generate(*args, **kwargs)`, by name."""
    names = list(inspect.signature(type(module).generate).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def by_name_of_forward(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a call of the module, by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def takes_more(module: nn.Module) -> bool:
    """Whether the module's forward takes keywords that it does not name."""
    found = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)


def generates_with(module: Any) -> frozenset[str]:
    """The names of the arguments of transformers' own `generate`, and of its configuration."""
    mixins = [kind for kind in type(module).__mro__ if kind.__name__ == "GenerationMixin"]
    taken = parameters(mixins[0].generate) if mixins else frozenset[str]()
    return taken | frozenset(vars(getattr(module, "generation_config", object)))
