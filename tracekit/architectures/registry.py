"""Which family a model is of: by what its configuration says, or by its structure."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from tracekit.architectures import families
from tracekit.architectures.binding import Names
from tracekit.architectures.schema import Family, SubModel


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
    return _declared_for(getattr(module, "config", None))


def _declared_for(config: Any) -> Family | None:
    family = known_families().get(getattr(config, "model_type", None) or "")
    while family is not None and family.when is not None and not family.when(config):
        family = family.otherwise
    for part in family.parts if family is not None else ():
        assert family is not None
        inner = _declared_for(getattr(config, part.config, None))
        family = family if inner is None else _with_part(family, part, inner)
    return family


def _with_part(family: Family, part: SubModel, inner: Family) -> Family:
    """`family` with what the family of one of its parts declares, seen from the whole."""
    words = part.words
    if words is None:
        words = {word: word for word in (*inner.modules, *inner.stacks)}
    modules = {
        words[word]: _inside(part, paths) for word, paths in inner.modules.items() if word in words
    }
    stacks = {
        words[word]: replace(stack, path=_inside(part, stack.path), config=part.config)
        for word, stack in inner.stacks.items()
        if word in words
    }
    found = replace(
        family, modules={**modules, **family.modules}, stacks={**stacks, **family.stacks}
    )
    if part.words is not None:
        return found
    activations = {**inner.activations, **family.activations}
    return replace(found, activations=activations, lacks={**inner.lacks, **family.lacks})


def _inside(part: SubModel, paths: str | tuple[str, ...]) -> tuple[str, ...]:
    """Paths of a part's modules in the whole: with its head, or as a base model without it."""
    found: list[str] = []
    for outer in (part.path,) if isinstance(part.path, str) else part.path:
        for path in (paths,) if isinstance(paths, str) else paths:
            bare = path.partition(".")[2]
            found += [f"{outer}.{path}", *([f"{outer}.{bare}"] if bare else [])]
    return tuple(found)


def names_of(module: nn.Module) -> Names | None:
    """The standard names of a model; None where its family is not known."""
    family = family_of(module)
    names = Names(family, module) if family is not None else None
    return names if names is not None and names.stacks else None
