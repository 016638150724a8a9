"""The modules of a model as a tree, with what a cache recorded of each; layers alike are folded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from tracekit.core.nest import first_tensor
from tracekit.core.quirks import own_children
from tracekit.errors import TracekitError
from tracekit.tracing.cache import Cache
from tracekit.tracing.envoy import Envoy
from tracekit.viz.parts import Branch, Item, Part, Tree
from tracekit.viz.wording import brief, counted

_OPEN = 3  # floors that are open at first
# What two modules are alike by: type, settings, number of parameters, and what is in them.
_Form: TypeAlias = "tuple[type, str, int, tuple[tuple[str, _Form], ...]]"


class _Child(NamedTuple):
    name: str
    path: str
    module: nn.Module


def tree_of(envoy: Envoy, cache: Cache | None) -> list[Part]:
    """The parts of the picture: the tree, with the statistics of outputs if there is a cache."""
    columns = ("parameters",)
    if cache is not None:
        columns += ("output", "mean", "std", "max |x|", "nan")
    top = _Child(envoy.path, envoy.path, envoy.module)
    return [Tree(columns, (_branch(top, cache, 0),), "modules")]


def told(envoy: Envoy) -> str:
    """What the model is, in a line."""
    module: nn.Module = envoy.module
    count = sum(weight.numel() for weight in module.parameters())
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in module.parameters()})
    weights = f"{counted(count)} parameters{', ' if kinds else ''}{' and '.join(kinds)}"
    return f"{type(module).__name__}: {weights}"


def _branch(child: _Child, cache: Cache | None, depth: int) -> Branch:
    below: list[Branch] = []
    for group in _groups(child):
        each = [_branch(one, cache, depth + 1 + (len(group) > 1)) for one in group]
        below += [_folded(group, each, cache, depth + 1)] if len(group) > 1 else each
    kind = type(child.module).__name__
    items = _items(child.module, child.path, cache)
    return Branch(child.name, kind, items, tuple(below), depth < _OPEN or _is_bad_in(below))


def _folded(group: list[_Child], each: list[Branch], cache: Cache | None, depth: int) -> Branch:
    """One branch for modules alike: each, if there are numbers to tell, or what is in one."""
    first, last = group[0], group[-1]
    name = f"{first.name} \N{HORIZONTAL ELLIPSIS} {last.name}"
    kind = f"{len(group)} x {type(first.module).__name__}, alike"
    count = Item(f"{len(group)} x {counted(_parameters(first.module))}", "number")
    below = each[0].below if cache is None else tuple(each)
    return Branch(name, kind, (count,), below, depth < _OPEN or _is_bad_in(below))


def _is_bad_in(branches: Iterable[Branch]) -> bool:
    """Whether one of these has what is to be seen at once."""
    return any(
        any(item.mood == "bad" for item in branch.items) or _is_bad_in(branch.below)
        for branch in branches
    )


def _groups(child: _Child) -> Iterator[list[_Child]]:
    """The children; those that are numbered, and alike, in one group."""
    children = [
        _Child(name, f"{child.path}.{name}", module)
        for name, module in own_children(child.module).items()
        if module is not None
    ]
    numbers = iter(range(len(children)))

    def key(one: _Child) -> Any:
        return _form(one.module) if one.name.isdigit() else next(numbers)

    for _, group in groupby(children, key):
        yield list(group)


def _form(module: nn.Module) -> _Form:
    children = own_children(module).items()
    below = tuple((name, _form(each)) for name, each in children if each is not None)
    return type(module), module.extra_repr(), _parameters(module), below


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _items(module: nn.Module, path: str, cache: Cache | None) -> tuple[Item, ...]:
    count = _parameters(module)
    own = Item(counted(count) if count else "", "number", f"{count} parameters" if count else "")
    return (own,) if cache is None else (own, *_statistics(cache, path))


def _statistics(cache: Cache, path: str) -> Iterator[Item]:
    """Shape and dtype, mean, deviation, largest, and how many are no numbers."""
    value = _output(cache, path)
    if value is None:
        return
    dtype = str(value.dtype).removeprefix("torch.")
    yield Item(f"{list(value.shape)} {dtype}")
    if not (value.is_floating_point() and value.numel()):
        return
    numbers = value.detach().double()
    known, some = numbers[numbers.isfinite()], numbers[~numbers.isnan()]
    nans = numbers.numel() - some.numel()
    found = (
        known.mean() if known.numel() else None,
        known.std(correction=0) if known.numel() else None,
        some.abs().max() if some.numel() else None,  # it may be infinite
    )
    for number in (math.nan if each is None else each.item() for each in found):
        yield Item(brief(number), "number" if math.isfinite(number) else "bad", str(number))
    told = f"{nans} of {numbers.numel()} are no number"
    yield Item(str(nans), "bad" if nans else "number", told)


def _output(cache: Cache, path: str) -> Tensor | None:
    """The first tensor that a module gave at its first recorded visit."""
    entries = cache.get(path)
    if not entries:
        return None
    try:
        return first_tensor(entries[0].output)
    except TracekitError:  # no outputs were recorded
        return None
