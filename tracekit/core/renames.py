"""Other names for modules: `{"transformer.h": "layers", "transformer.h.*.attn": "self_attn"}`."""

# An alias stands in the place of the key, or of what comes behind its last `*`: the first above is
# `model.layers`, the second `self_attn` of every block. A key is looked for below every module, so
# "mlp.c_proj" is that of every block, too.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, final

from torch import nn

from tracekit.errors import AliasError, did_you_mean

Rename: TypeAlias = Mapping[str | type[nn.Module], str | Sequence[str]]
# By the path of a module and a name that it has for another, the path of that one.
Aliases: TypeAlias = dict[tuple[str, str], str]


@final
class Renames:
    """The aliases that a user gave; checked when the model is made, and followed afterwards."""

    def __init__(self, rename: Rename, reserved: frozenset[str]) -> None:
        self._rename = {
            key: (given,) if isinstance(given, str) else tuple(given)
            for key, given in rename.items()
        }
        self._reserved = reserved  # names that mean something else on every module

    def aliases(self, modules: Mapping[str, nn.Module], is_checked: bool) -> Aliases:
        """Every alias there is; AliasError, if `is_checked`, for those that can't be."""
        found: Aliases = {}
        for key, given in self._rename.items():
            matches = list(_matches(key, modules))
            if not matches and is_checked:
                raise AliasError(_matches_nothing(key, modules))
            for owner, path in matches:
                for alias in given:
                    self._bind(found, modules, owner, path, alias, is_checked)
        return found

    def _bind(
        self,
        found: Aliases,
        modules: Mapping[str, nn.Module],
        owner: str,
        path: str,
        alias: str,
        is_checked: bool,
    ) -> None:
        *way, name = alias.split(".")
        for step in way:
            owner = found.get((owner, step), f"{owner}.{step}")
        why = self._why_not(found, modules, owner, path, name)
        if why is None:
            found[owner, name] = path
        elif is_checked:
            raise AliasError(f"{alias!r} can't be another name of {path}: {why}.")

    def _why_not(
        self,
        found: Aliases,
        modules: Mapping[str, nn.Module],
        owner: str,
        path: str,
        name: str,
    ) -> str | None:
        if not name.isidentifier():
            return "a name is made of letters, digits and underscores, and of dots between"
        if not path.startswith(f"{owner}."):
            return f"{owner} is not a module that contains it"
        if name in self._reserved or hasattr(modules[owner], name):
            return f"{owner}.{name} is something else already"
        other = found.get((owner, name), path)
        if other != path:
            return f"{owner}.{name} is to be another name of {other} as well"
        return None


def spellings(modules: Mapping[str, nn.Module], aliases: Aliases) -> Iterator[tuple[str, str]]:
    """Every way to spell a path with aliases in it, and the path that it means."""
    given: dict[str, list[tuple[str, str]]] = {}
    for (owner, alias), path in aliases.items():
        given.setdefault(path, []).append((owner, alias))
    spelled: dict[str, list[str]] = {}
    for path in modules:  # a module comes before those in it
        parent, _, name = path.rpartition(".")
        ways = [(parent, name)] if parent in spelled else []
        others = [*ways, *given.get(path, ())]
        spelled[path] = [f"{start}.{last}" for owner, last in others for start in spelled[owner]]
        spelled[path] = spelled[path] or [path]
        yield from ((way, path) for way in spelled[path] if way != path)


def _matches(
    key: str | type[nn.Module], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str]]:
    """The modules that are meant, each after the module that the alias is a name in."""
    root = next(iter(modules))
    if not isinstance(key, str):
        of_kind = (path for path, module in modules.items() if isinstance(module, key))
        yield from ((path.rpartition(".")[0], path) for path in of_kind if path != root)
        return
    parts = key.strip(".").split(".")
    stars = [index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")]
    behind = len(parts) if not stars else len(parts) - 1 - stars[-1] or 1
    for path in modules:
        names = path.removeprefix(root).split(".")[1:]
        tail = names[-len(parts) :]
        if len(tail) == len(parts) and all(map(fnmatchcase, tail, parts)):
            yield path.rsplit(".", behind)[0], path


def _matches_nothing(key: str | type[nn.Module], modules: Mapping[str, nn.Module]) -> str:
    root = next(iter(modules))
    kind = type(modules[root]).__name__
    if not isinstance(key, str):
        kinds = sorted({type(module).__name__ for module in modules.values()})
        return (
            f"rename= has a name for every {key.__name__}, and {kind} has none"
            f"{did_you_mean(key.__name__, kinds)}."
        )
    length = len(key.split("."))
    tails = {".".join(path.split(".")[1:][-length:]) for path in modules if path != root}
    return (
        f"rename= has a name for {key!r}, which is no module of {kind}"
        f"{did_you_mean(key, sorted(tails))}"
    )
