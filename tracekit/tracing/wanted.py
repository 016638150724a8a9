"""Which activations are meant: a name in any spelling, a path, a glob, a predicate, a list."""

# A glob is tried on the standard names; if none fits, on TransformerLens'; if none fits again, on
# the paths of modules. A predicate may speak of both, as in `"hook_z" in name or "embed" in name`:
# it means whatever it is true of by either name, so that nothing is left out silently.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast, final

from tracekit.architectures import Bound, Key, Keys, Named, Sharing
from tracekit.architectures.keys import COSTLY
from tracekit.architectures.layouts import WHOLE
from tracekit.core.annex import inner_owner_of, owner_of
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, MissingNameError, UnknownPathError, did_you_mean
from tracekit.interleave.taps import is_tappable
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.named import attach_inner

# A predicate takes the name alone.
Names: TypeAlias = "str | tuple[Any, ...] | Envoy | Callable[[str], bool] | Iterable[Names]"
_SLOTS = {".output": Slot.OUTPUT, ".input": Slot.INPUT}


@final
@dataclass(frozen=True)
class Spot:
    """An activation, where it is, and how it was asked for."""

    key: str
    site: Site
    named: Named
    spelled: str  # as it was asked for, where that was one name
    is_named: bool  # by itself


def wanted(tree: Tree, names: Names | None, what: str = "names_filter=") -> list[Spot]:
    """The activations meant, each once, in the order of the model.

    None means all, except those that take many times the memory of others. UnknownPathError, with
    near names, for any that the model does not have; MissingNameError for a standard name that its
    architecture has nothing for.
    """
    tree.refresh_if_changed()
    if names is None:
        return _every(tree)
    found: dict[str, Spot] = {}
    for spot in _matches(tree, names, what):
        known = found.get(spot.key)
        if known is None or not known.is_named:
            found[spot.key] = spot
    if not found:
        raise CacheError(f"{what} names nothing; leave it out to have every name.")
    return list(found.values())


def _every(tree: Tree) -> list[Spot]:
    keys = keys_of(tree)
    if keys is None:
        return [_of_path(tree, path, Slot.OUTPUT, "", is_named=False) for path in tree.called]
    every = _there(tree, keys).values()
    return [_spot(tree, named) for named in every if named.key.name not in COSTLY]


def keys_of(tree: Tree) -> Keys | None:
    """The keys of a model; None if its architecture is not known."""
    return None if tree.names is None else tree.names.keys


def _matches(tree: Tree, names: Names, what: str) -> list[Spot]:
    if isinstance(names, Envoy):
        return [_of_path(tree, _own_path(tree, names), Slot.OUTPUT, names.path)]
    if isinstance(names, str):
        is_glob = any(sign in names for sign in "*?[")
        return _by_glob(tree, names) if is_glob else _by_key(tree, names, names)
    if isinstance(names, tuple) and _reads(tree, names):
        return _by_key(tree, names, "")
    if callable(names):
        return _fitting(tree, names, f"the predicate given as {what}", is_of_both=True)
    if not isinstance(cast("object", names), Iterable):
        raise CacheError(
            f"{what} takes names of activations, globs, predicates or a list of them, not "
            f"{type(names).__name__}."
        )
    return [spot for each in names for spot in _matches(tree, each, what)]


def _reads(tree: Tree, asked: tuple[Any, ...]) -> bool:
    """Whether a tuple is one name; else it is several."""
    keys = keys_of(tree)
    try:
        return keys is not None and keys.spelling.read(asked) is not None
    except IndexError:
        return True


def _by_key(tree: Tree, asked: object, spelled: str) -> list[Spot]:
    keys = keys_of(tree)
    key = None if keys is None else read_key(keys, asked)
    if keys is None or key is None:
        return [_by_path(tree, str(asked))]
    there = _there(tree, keys)
    found = [each for each in keys.matching(key) if str(each.key) in there]
    if not found:
        told = key if key.layer is not None or key.is_of_root else key.name
        raise MissingNameError(
            f"{type(tree.root).__name__} has no {str(told)!r}: {keys.why_not(key)}."
        )
    is_one = len(found) == 1
    return [_spot(tree, each, spelled if is_one else "", is_named=True) for each in found]


def read_key(keys: Keys, asked: object) -> Key | None:
    """The key meant; UnknownPathError if there is no such layer."""
    try:
        return keys.spelling.read(asked)
    except IndexError as error:
        raise UnknownPathError(f"{asked!r} is no activation: {error.args[0]}") from None


def _by_path(tree: Tree, text: str) -> Spot:
    for ending, slot in (*_SLOTS.items(), ("", Slot.OUTPUT)):
        if text.endswith(ending) and (path := _known_path(tree, text.removesuffix(ending))):
            return _of_path(tree, path, slot, text)
    raise UnknownPathError(
        f"{text!r} is neither an activation nor a module of {type(tree.root).__name__}"
        f"{did_you_mean(text, _every_spelling(tree))}"
    )


def _known_path(tree: Tree, text: str) -> str | None:
    try:
        path = tree.canonical(text)
    except AttributeError:
        return None
    return path if tree.is_called(path) else None


def _by_glob(tree: Tree, glob: str) -> list[Spot]:
    near = did_you_mean(glob, _every_spelling(tree))
    return _fitting(tree, lambda name: fnmatchcase(name, glob), f"the glob {glob!r}", near)


def _fitting(
    tree: Tree, fits: Callable[[str], bool], what: str, near: str = "", *, is_of_both: bool = False
) -> list[Spot]:
    keys = keys_of(tree)
    every = [] if keys is None else list(_there(tree, keys).values())
    fitting = {str(each.key): "" for each in every if fits(str(each.key))}
    if not fitting or is_of_both:
        hooks = {str(each.key): each.key.hook for each in every}
        fitting = {key: hook for key, hook in hooks.items() if hook and fits(hook)} | fitting
    found = [_spot(tree, each, fitting[key]) for each in every if (key := str(each.key)) in fitting]
    if not found:
        paths = [path for path in tree.called if fits(tree.below(path)) or fits(path)]
        found = [_of_path(tree, path, Slot.OUTPUT, "", is_named=False) for path in paths]
    if not found:
        raise UnknownPathError(
            f"{what} fits no activation and no module of {type(tree.root).__name__}{near}"
        )
    return found


def _own_path(tree: Tree, envoy: Envoy) -> str:
    if not envoy.belongs_to(tree):
        raise UnknownPathError(f"{envoy.path} is a module of another model than the one that runs")
    return tree.aliases.get(envoy.path, envoy.path)


def _spot(tree: Tree, named: Named, spelled: str = "", *, is_named: bool = False) -> Spot:
    bound = named.bound
    site = Site(_full(tree, bound.path), bound.slot)
    key = str(named.key)
    return Spot(key, site, named, spelled or key, is_named)


def _full(tree: Tree, below: str) -> str:
    path = f"{tree.name}.{below}".rstrip(".")
    return tree.aliases.get(path, path)


def _there(tree: Tree, keys: Keys) -> Mapping[str, Named]:
    """The activations that the model has the modules for; of attentions, those that are read."""
    if keys.there is None:
        every = keys.every.items()
        keys.there = {key: named for key, named in every if _is_there(tree, named.bound)}
    return keys.there


def _is_there(tree: Tree, bound: Bound) -> bool:
    inner = inner_owner_of(bound.path)
    if inner is not None:
        return attach_inner(tree, bound)
    owner = owner_of(_full(tree, bound.path))
    if owner is None:
        return _full(tree, bound.path) in tree.modules
    owner = tree.aliases.get(owner, owner)
    if owner not in tree.called or not is_tappable(tree, owner):
        return False
    tree.attach(owner)
    return True


def _of_path(tree: Tree, path: str, slot: Slot, spelled: str, *, is_named: bool = True) -> Spot:
    """What a module takes or returns, by its path: the first tensor of it."""
    below = tree.below(path) or path
    key = below if slot is Slot.OUTPUT else f"{below}.input"
    bound = Bound(key, below, slot, WHOLE, Sharing.OWN, None, "")
    return Spot(key, Site(path, slot), Named(Key(key), bound), spelled or key, is_named)


def _every_spelling(tree: Tree) -> Sequence[str]:
    keys = keys_of(tree)
    named = [] if keys is None else [each.key for each in _there(tree, keys).values()]
    hooks = [key.hook for key in named if key.hook is not None]
    bare = list(dict.fromkeys(key.name for key in named))
    return [*map(str, named), *hooks, *bare, *map(tree.below, tree.called)]
