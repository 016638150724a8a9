"""Which modules are meant: an Envoy, a path, a glob, a predicate, or a list of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

from torch import nn

from tracekit.core.annex import ANNEX, PIECES
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, UnknownPathError, did_you_mean
from tracekit.interleave.taps import is_tappable
from tracekit.tracing.envoy import Envoy

# A predicate takes the path and the torch module.
Selector: TypeAlias = "Envoy | str | Callable[[str, Any], bool] | Iterable[Selector]"


def select(tree: Tree, modules: Selector | None) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules meant, by canonical path, and the paths among them that were named one by one.

    None means every module. A container that is never called stands for the modules in it.
    Raises UnknownPathError, with near matches, for what the model does not have.
    """
    tree.refresh_if_changed()
    if modules is None:
        return tree.called, set()
    found: dict[str, bool] = {}
    for path, is_named in _matches(tree, modules):
        found[path] = found.get(path, False) or is_named
    if not found:
        raise CacheError("modules= names no module; leave it out to record every module.")
    named = {path for path, is_named in found.items() if is_named}
    return {path: tree.modules[path] for path in found}, named


def _matches(tree: Tree, selector: Selector) -> list[tuple[str, bool]]:
    if isinstance(selector, Envoy):
        return _called(tree, _own_path(tree, selector))
    if isinstance(selector, str):
        return _by_text(tree, selector)
    if callable(selector):
        found = [path for path in tree.paths() if selector(path, tree.module(path))]
        return _loosely(tree, found, "the predicate given as modules=")
    if not isinstance(cast("object", selector), Iterable):
        raise CacheError(
            f"modules= takes modules of the model, paths, globs, predicates or a list of them, "
            f"not {type(selector).__name__}."
        )
    return [match for each in selector for match in _matches(tree, each)]


def _by_text(tree: Tree, text: str) -> list[tuple[str, bool]]:
    if any(sign in text for sign in "*?["):
        globs = (text, f"{tree.name}.{text}")
        pieces = _pieces_meant(tree, globs)
        if pieces:
            return pieces
        spelled = (*tree.paths(), *tree.aliases)
        meant = {
            tree.canonical(way) for way in spelled if any(fnmatchcase(way, glob) for glob in globs)
        }
        found = [path for path in tree.paths() if path in meant]
        return _loosely(tree, found, f"the glob {text!r}", did_you_mean(text, _globs(tree)))
    try:
        return _called(tree, tree.canonical(text))
    except AttributeError:
        raise UnknownPathError(
            f"{text!r} is not a module of {type(tree.root).__name__}"
            f"{did_you_mean(text, [*tree.modules, *tree.aliases, *_without_root(tree)])}"
        ) from None


def _pieces_meant(tree: Tree, globs: tuple[str, ...]) -> list[tuple[str, bool]]:
    """The values of attentions that a glob means: one that names them, as `*.attention.pattern`."""
    name = globs[0].rpartition(".")[2]
    if name not in PIECES or not globs[0].endswith(f"{ANNEX}.{name}"):
        return []
    owners = [
        path
        for path in tree.called
        if any(fnmatchcase(f"{path}.{ANNEX}.{name}", glob) for glob in globs)
    ]
    paths = [f"{tree.attach(path)}.{name}" for path in owners if is_tappable(tree, path)]
    return [(path, False) for path in paths]


def _own_path(tree: Tree, envoy: Envoy) -> str:
    if envoy.path not in tree.modules or not envoy.belongs_to(tree):
        raise UnknownPathError(f"{envoy.path} is a module of another model than the one traced")
    return tree.aliases.get(envoy.path, envoy.path)


def _called(tree: Tree, path: str) -> list[tuple[str, bool]]:
    if tree.is_called(path):
        return [(path, True)]
    inside = tree.called_children(path)
    if not inside:
        raise CacheError(f"{path} is an empty {type(tree.module(path)).__name__}, never called.")
    return [(child, True) for child in inside]


def _loosely(tree: Tree, paths: list[str], what: str, cure: str = "") -> list[tuple[str, bool]]:
    called = [path for path in paths if tree.is_called(path)]
    if not called:
        raise UnknownPathError(f"{what} matches no module of {type(tree.root).__name__}{cure}")
    return [(path, False) for path in called]


def _globs(tree: Tree) -> set[str]:
    """The paths of the model, with a `*` in the place of each number."""
    return {re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in _without_root(tree)}


def _without_root(tree: Tree) -> list[str]:
    return [path.removeprefix(f"{tree.name}.") for path in (*tree.modules, *tree.aliases)]
