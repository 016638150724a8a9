"""The modules of a model as a tree, with what a cache recorded of each; layers alike are folded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import nn

from tracekit.models.activity import activity_in
from tracekit.models.outline import Branch as Module
from tracekit.models.outline import groups, outline
from tracekit.tracing.cache import Cache
from tracekit.tracing.envoy import Envoy
from tracekit.viz.parts import Branch, Item, Part, Tree
from tracekit.viz.wording import brief, counted

_OPEN = 3  # floors that are open at first


def tree_of(envoy: Envoy, cache: Cache | None) -> list[Part]:
    """The parts of the picture: the tree, with the statistics of outputs if there is a cache."""
    columns = ("parameters",)
    if cache is not None:
        columns += ("output", "mean", "std", "max |x|", "nan")
    top = outline(envoy, fold=False)
    return [Tree(columns, (_branch(top, envoy.path, cache, 0),), "modules")]


def told(envoy: Envoy) -> str:
    """What the model is, in a line."""
    module: nn.Module = envoy.module
    count = sum(weight.numel() for weight in module.parameters())
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in module.parameters()})
    weights = f"{counted(count)} parameters{', ' if kinds else ''}{' and '.join(kinds)}"
    return f"{type(module).__name__}: {weights}"


def _branch(module: Module, name: str, cache: Cache | None, depth: int) -> Branch:
    below: list[Branch] = []
    for group in groups(module.branches):
        inner = depth + 1 + (len(group) > 1)
        each = [_branch(one, one.name, cache, inner) for one in group]
        below += [_folded(group, each, cache, depth + 1)] if len(group) > 1 else each
    kind = f"{module.kind}{f' = {module.same_as}' if module.same_as else ''}"
    items = (_weight(module), *(_statistics(cache, module.paths[0]) if cache is not None else ()))
    return Branch(name, kind, items, tuple(below), depth < _OPEN or _is_bad_in(below))


def _folded(group: list[Module], each: list[Branch], cache: Cache | None, depth: int) -> Branch:
    """One branch for modules alike: each, if there are numbers to tell, or what is in one."""
    first, last = group[0], group[-1]
    name = f"{first.name} \N{HORIZONTAL ELLIPSIS} {last.name}"
    kind = f"{len(group)} x {first.kind}, alike"
    count = Item(f"{len(group)} x {counted(first.own)}", "number")
    below = each[0].below if cache is None else tuple(each)
    return Branch(name, kind, (count,), below, depth < _OPEN or _is_bad_in(below))


def _is_bad_in(branches: Iterable[Branch]) -> bool:
    """Whether one of these has what is to be seen at once."""
    return any(
        any(item.mood == "bad" for item in branch.items) or _is_bad_in(branch.below)
        for branch in branches
    )


def _weight(module: Module) -> Item:
    """How many parameters are counted here: those of no branch before."""
    if not module.parameters:
        return Item("", "number")
    above = module.parameters - module.own
    tip = f"{module.parameters} parameters{f', {above} of them counted above' if above else ''}"
    return Item(counted(module.own), "number", tip)


def _statistics(cache: Cache, path: str) -> Iterator[Item]:
    """Shape and dtype, mean, deviation, largest, and how many are no numbers."""
    found = activity_in(cache, path)
    if found is None:
        return
    yield Item(f"{list(found.shape)} {found.dtype}")
    for number in (found.mean, found.std, found.largest):
        if number is None:
            return
        yield Item(brief(number), "number" if math.isfinite(number) else "bad", str(number))
    tip = f"{found.nans} of {math.prod(found.shape)} are no number"
    yield Item(str(found.nans), "bad" if found.nans else "number", tip)
