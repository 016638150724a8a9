"""The standard names of a model, each with its place; layers that are alike are listed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from tracekit.architectures import Names
from tracekit.architectures.layouts import Whole
from tracekit.core.words import (
    ACTIVATIONS,
    BLOCK_ACTIVATIONS,
    BLOCK_MODULES,
    PART_MODULES,
    ROOT_ACTIVATIONS,
    ROOT_MODULES,
)
from tracekit.models.language import LanguageModel


@final
@dataclass(frozen=True)
class Naming:
    """A standard name: whose it is ("model.layers[0-3]"), where that is, and what it means.

    `place` is a path, with `*` for the number of the layer, and of a value the slot behind it.
    `shape` names the axes of a value; it is empty for modules.
    """

    owner: str
    name: str
    place: str
    is_view: bool  # of what is there: a part, or with other axes
    shape: str
    meaning: str

    def row(self) -> list[str]:
        """Its cells in a table."""
        place = f"view of {self.place}" if self.is_view else self.place
        return [self.name, place, f"[{self.shape}]" if self.shape else "module", self.meaning]

    def to_json(self) -> dict[str, Any]:
        """What it holds, as a dictionary."""
        return dict(vars(self))


def namings(model: LanguageModel) -> list[Naming]:
    """All standard names of the model and of its layers, in the order of the glossary."""
    names: Any = model._tree.names  # pyright: ignore[reportPrivateUsage] - nobody below lists them
    if not isinstance(names, Names):
        return []
    found = list(_of_owner(names, "", model.path, model.path))
    for stack in names.stacks:
        for first, paths in _alike(names, stack):
            last = first + len(paths) - 1
            numbers = str(first) if first == last else f"{first}-{last}"
            owner = f"{model.path}.{stack}[{numbers}]"
            found += _of_owner(names, paths[0], owner, f"{model.path}.{_shared(paths)}")
    return found


def _alike(names: Names, stack: str) -> Iterator[tuple[int, list[str]]]:
    """The runs of layers with the same names at the same places: the first, and the paths."""
    paths = [path for path, _ in names.stacks[stack]]
    first = 0
    for index in range(1, len(paths) + 1):
        if index == len(paths) or _places(names, paths[index]) != _places(names, paths[first]):
            yield first, paths[first:index]
            first = index


def _shared(paths: Sequence[str]) -> str:
    """What paths have in common, with `*` for the parts in which they differ."""
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)


def _places(names: Names, owner: str) -> Sequence[tuple[str, str, bool]]:
    return [(each.name, each.place, each.is_view) for each in _of_owner(names, owner, "", "")]


def _of_owner(names: Names, owner: str, told: str, path: str) -> Iterator[Naming]:
    """The names that a layer has (the model, if its path is empty), and the modules in it."""
    root = owner == ""
    for word in names.words(owner):
        if word in ACTIVATIONS:
            bound = names.point(owner, word)
            assert bound is not None
            place = f"{_told(bound.path, owner, path)}.{bound.slot.value}"
            meaning = (ROOT_ACTIVATIONS if root else BLOCK_ACTIVATIONS)[word].meaning
            yield Naming(told, word, place, bound.layout != Whole(), bound.shape, meaning)
            continue
        module = names.module(owner, word)
        if module is None:
            continue
        known = {**(ROOT_MODULES if root else BLOCK_MODULES), **PART_MODULES}
        yield Naming(told, word, _told(module, owner, path), False, "", known[word].meaning)
        if not root:
            yield from _parts(names, module, f"{told}.{word}", _told(module, owner, path))


def _parts(names: Names, module: str, told: str, path: str) -> Iterator[Naming]:
    for word in names.words(module):
        inside = names.module(module, word)
        if inside is not None:
            name = f"{told.rpartition('.')[2]}.{word}"
            place = _told(inside, module, path)
            yield Naming(
                told.rpartition(".")[0], name, place, False, "", PART_MODULES[word].meaning
            )


def _told(path: str, owner: str, shown: str) -> str:
    """A path, with what is shown in the place of its owner's."""
    if owner == "":
        return f"{shown}.{path}".rstrip(".")
    return shown + path.removeprefix(owner) if f"{path}.".startswith(f"{owner}.") else path
