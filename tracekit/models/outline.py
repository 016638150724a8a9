"""The modules of a model as a tree that can be taken in: layers that are alike are one branch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

from torch import nn

from tracekit.core.quirks import own_children
from tracekit.core.tree import StandardNames, Tree
from tracekit.core.words import ACTIVATIONS
from tracekit.tracing.envoy import Envoy

# The weights of a module itself: each one's name, and its shape.
Weights: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@final
@dataclass(frozen=True)
class Branch:
    """A module, or several that follow each other and are alike; `paths` has the path of each.

    `parameters` are those of one, with all in it, each once; `own` of them no branch before it has.
    `settings` is what PyTorch tells of it beside its name. `names` are the standard names of
    modules that it has. `same_as` is the path that it, or its first weight, has as well: such a
    module is shown there, and here only named.
    """

    name: str  # "attn"; of several layers "0-11"
    paths: tuple[str, ...]
    kind: str
    settings: str
    weights: Weights
    parameters: int
    own: int
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
            "settings": self.settings,
            "parameters": self.parameters,
            "own": self.own,
            "weights": {name: list(shape) for name, shape in self.weights},
            "names": list(self.names),
            "same_as": self.same_as or None,
            "branches": [branch.to_json() for branch in self.branches],
        }


def outline(top: Envoy, *, fold: bool = True) -> Branch:
    """The tree of modules of a model, or of one in it; alike layers are one branch if `fold`."""
    tree: Tree = top._tree  # pyright: ignore[reportPrivateUsage] - a friend
    return _Drawing(tree, fold).branch(top.path, top.module)


@final
class _Drawing:
    """One outline on its way: what was shown already, so that shared modules come once."""

    def __init__(self, tree: Tree, fold: bool) -> None:
        self._names = _names_by_path(tree)
        self._fold = fold
        self._seen: dict[int, str] = {}  # modules and weights by identity: where they came first

    def branch(self, path: str, module: nn.Module) -> Branch:
        every = list(module.parameters())
        head = Branch(
            path.rpartition(".")[2],
            (path,),
            type(module).__name__,
            module.extra_repr(),
            weights=(),
            parameters=sum(each.numel() for each in every),
            own=sum(each.numel() for each in every if id(each) not in self._seen),
            names=self._names.get(path, ()),
            same_as=self._seen.get(id(module), ""),
        )
        if head.same_as:
            return head
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
        return replace(head, weights=weights, branches=branches, same_as=tied)


def folded(branches: Iterable[Branch]) -> Iterator[Branch]:
    """Neighbours with numbers for names that are alike as one branch each."""
    return (_joined(group) if len(group) > 1 else group[0] for group in groups(branches))


def groups(branches: Iterable[Branch]) -> Iterator[list[Branch]]:
    """Neighbours with numbers for names that are alike together, each other branch by itself."""
    for _, group in itertools.groupby(branches, _likeness):
        alike = list(group)
        yield from [alike] if alike[0].name.isdecimal() else ([each] for each in alike)


def _joined(alike: Sequence[Branch]) -> Branch:
    """Several branches that are alike as one; in it, too, each path stands beside its fellows."""
    first, last = alike[0], alike[-1]
    name = first.name if first.name == last.name else f"{first.name}-{last.name}"
    inside = zip(*(each.branches for each in alike), strict=True)
    return replace(
        first,
        name=name,
        paths=tuple(path for each in alike for path in each.paths),
        names=_joined_names([each.names for each in alike]),
        branches=tuple(_joined(fellows) for fellows in inside),
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
    kind = (branch.kind, branch.settings, branch.weights, branch.own)
    return (number, kind, names, bool(branch.same_as), inside)


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
