"""Which family a model is of: by what its configuration says, or by its structure."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any

from torch import nn

from tracekit.architectures import families
from tracekit.architectures.binding import Names
from tracekit.architectures.schema import Family


@lru_cache(maxsize=1)
def known_families() -> dict[str, Family]:
    """Every family that is declared, by model type."""
    found: dict[str, Family] = {}
    for each in pkgutil.iter_modules(families.__path__):
        family: Family = importlib.import_module(f"{families.__name__}.{each.name}").FAMILY
        found |= dict.fromkeys(family.model_types, family)
    return found


def family_of(module: nn.Module) -> Family | None:
    """The family that is declared for a model; None if there is none."""
    config: Any = getattr(module, "config", None)
    return known_families().get(getattr(config, "model_type", None) or "")


def names_of(module: nn.Module) -> Names | None:
    """The standard names of a model; None where its family is not known."""
    family = family_of(module)
    names = Names(family, module) if family is not None else None
    return names if names is not None and names.stacks else None
