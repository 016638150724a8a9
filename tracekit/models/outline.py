"""The modules of a model as a tree that can be taken in: layers that are alike are one branch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import nn

from tracekit.core.quirks import own_children
from tracekit.core.tree import StandardNames, Tree
from tracekit.core.words import ACTIVATIONS
from tracekit.models.model import Model

# The weights of a module itself: each one's name, and its shape.
Weights: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@final
@dataclass(frozen=True)
class Branch:
    """A module, or several that follow each other and are alike; `paths` has the path of each.

    `parameters` are those of one, with all in it, each once. `names` are the standard names of
    modules that it has. `same_as` is the path that it, or its first weight, has as well: such a
    module is shown there, and here only named.
    """

    name: str  # "attn"; of several layers "0-11"
    paths: tuple[str, ...]
    kind: str
    weights: Weights
    parameters: int
    names: tuple[str, ...]
    branches: tuple[Branch, ...] = ()
    same_as: str = ""

    def __iter__(self) -> Iterator[Branch]:
        """This branch and all in it, from the top."""
        yield self
        for branch in self.branches:
            yield from branch

    def to_json(self) -> dict[str, Any]:
        """What it holds, in dictionaries, lists, numbers and strings."""
        return {
            "name": self.name,
            "paths": list(self.paths),
            "kind": self.kind,
            "parameters": self.parameters,
            "weights": {name: list(shape) for name, shape in self.weights},
            "names": list(self.names),
            "same_as": self.same_as or None,
            "branches": [branch.to_json() for branch in self.branches],
        }


def outline(model: Model, *, fold: bool = True) -> Branch:
    """The tree of a model's modules, with alike layers folded into one branch if `fold`."""
    tree: Tree = model._tree  # pyright: ignore[reportPrivateUsage] - a friend
    return _Drawing(tree, fold).branch(tree.name, tree.root)


@final
class _Drawing:
    """One outline on its way: what was shown already, so that shared modules come once."""

    def __init__(self, tree: Tree, fold: bool) -> None:
        self._names = _names_by_path(tree)
        self._fold = fold
        self._seen: dict[int, str] = {}  # modules and weights by identity: where they came first

    def branch(self, path: str, module: nn.Module) -> Branch:
        names, kind = self._names.get(path, ()), type(module).__name__
        name = path.rpartition(".")[2]
        count = sum(weight.numel() for weight in module.parameters())
        if id(module) in self._seen:
            return Branch(name, (path,), kind, (), count, names, (), self._seen[id(module)])
        self._seen[id(module)] = path
        own = dict(module.named_parameters(recurse=False))
        weights = tuple((key, tuple(each.shape)) for key, each in own.items())
        tied = next((self._seen[id(each)] for each in own.values() if id(each) in self._seen), "")
        for key, each in own.items():
            self._seen.setdefault(id(each), f"{path}.{key}")
        found = [
            self.branch(f"{path}.{key}", child)
            for key, child in own_children(module).items()
            if child is not None
        ]
        branches = tuple(folded(found) if self._fold else found)
        return Branch(name, (path,), kind, weights, count, names, branches, tied)


def folded(branches: Sequence[Branch]) -> list[Branch]:
    """Neighbours with numbers for names that are alike as one branch each."""
    found: list[Branch] = []
    for _, group in itertools.groupby(branches, _likeness):
        alike = list(group)
        found += [_joined(alike)] if alike[0].name.isdecimal() and len(alike) > 1 else alike
    return found


def _joined(alike: Sequence[Branch]) -> Branch:
    """Several branches that are alike as one; in it, too, each path stands beside its fellows."""
    first, last = alike[0], alike[-1]
    name = first.name if first.name == last.name else f"{first.name}-{last.name}"
    inside = zip(*(each.branches for each in alike), strict=True)
    return Branch(
        name,
        tuple(path for each in alike for path in each.paths),
        first.kind,
        first.weights,
        first.parameters,
        _joined_names([each.names for each in alike]),
        tuple(_joined(fellows) for fellows in inside),
        first.same_as,
    )


def _joined_names(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """`layers[0-3]` of `layers[0]` … `layers[3]`; other names are those of the first."""
    return tuple(
        one if one == other else f"{one.rstrip(']')}-{other.rpartition('[')[2]}"
        for one, other in zip(names[0], names[-1], strict=True)
    )


def _likeness(branch: Branch) -> tuple[Any, ...]:
    """What two branches have to share to be shown as one."""
    number = "" if branch.name.isdecimal() else branch.name
    names = tuple(name.partition("[")[0] for name in branch.names)
    inside = tuple((each.name, _likeness(each)) for each in branch.branches)
    return (number, branch.kind, branch.weights, names, bool(branch.same_as), inside)


def _names_by_path(tree: Tree) -> Mapping[str, tuple[str, ...]]:
    """The standard names of modules, by the full path of each; layers with their numbers."""
    names = tree.names
    found: dict[str, list[str]] = {}
    if names is None:
        return {}
    for stack, places in names.stacks.items():
        for index, (path, _) in enumerate(places):
            found.setdefault(f"{tree.name}.{path}", []).append(f"{stack}[{index}]")
    for owner in tree.order:
        for word, path in _modules_of(names, tree.below(owner)):
            at = f"{tree.name}.{path}".rstrip(".")
            if at != owner and word not in found.get(at, ()):
                found.setdefault(at, []).append(word)
    return {path: tuple(words) for path, words in found.items()}


def _modules_of(names: StandardNames, owner: str) -> Iterator[tuple[str, str]]:
    for word in names.words(owner):
        path = names.module(owner, word) if word not in ACTIVATIONS else None
        if path is not None:
            yield word, path
