"""Which entries of a value follow from which rows of a batch, by two real runs of a twin."""

# Of the rows of two runs one differs. What reaches other entries than its own is not in the order
# of the rows; and what is one for all rows, and differs, is made of all of them.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tracekit.core.nest import Nest, map_leaves, named_tensors
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.tracing.rehearsal import as_if_nothing_ran, real_twin, see_result, watched

# Given a number of rows: what runs a model, given by its Tree, on a batch of so many.
CallWith: TypeAlias = "Callable[[int], Callable[[Tree], object]]"

Key: TypeAlias = "tuple[Any, ...]"  # the way to a tensor in its nest
_Values: TypeAlias = "dict[Site, list[dict[Key, Tensor]]]"

_ROWS, _CHANGED = 3, 1  # of the runs that differ in one row
_DOES_NOT_SHOW = "which of its entries belong to which row does not show"


@dataclass(frozen=True)
class Learned:
    """What is known of one tensor in the values of a site."""

    axis: int | None = None  # None: it has no rows
    dims: int = 0
    per_row: int = 0  # entries for each row, in the runs that it was learned from
    is_sure: bool = True  # in the order of the rows, as far as sizes can tell
    doubt: str | None = None  # why it can't be told
    ones: tuple[int, ...] = ()  # if it has no rows: the axes of size 1, which may be broadcast


Known: TypeAlias = "dict[Site, list[dict[Key, Learned]]]"  # of every call, in order


def _has_rows(leaf: Learned) -> bool:
    return leaf.axis is not None and leaf.doubt is None


def leaves_of(
    known: Known, is_meant: Callable[[Learned], bool] = _has_rows
) -> list[tuple[Site, Key, int, Learned]]:
    """Every tensor that `is_meant`; that has rows, and no doubt about them."""
    return [
        (site, key, call, leaf)
        for site, calls in known.items()
        for call, leaves in enumerate(calls)
        for key, leaf in leaves.items()
        if is_meant(leaf)
    ]


def check_orders(
    tree: Tree, call_with: CallWith, known: Known, around: Known, opened: str | None
) -> None:
    """Put a doubt on every value in which a row reaches other entries than its own."""
    unsure = [found for found in leaves_of(known) if not found[3].is_sure]
    if not unsure:
        return
    sites = {site for site, *_ in unsure}
    try:
        plain, changed = (
            _values(tree, call_with, around, sites, opened, flag) for flag in (False, True)
        )
    except Exception as error:  # noqa: BLE001 - a model may raise anything where it can't run so
        doubt = f"the model can't be run to see the order of its rows ({type(error).__name__})"
        for site, key, call, leaf in unsure:
            known[site][call][key] = replace(leaf, doubt=doubt)
        return
    for site, key, call, leaf in unsure:
        if len(plain[site]) != len(changed[site]):
            doubt = "how often its module is called depends on the values"
        else:
            doubt = _other_order(leaf, plain[site][call][key], changed[site][call].get(key))
        known[site][call][key] = replace(leaf, is_sure=doubt is None, doubt=doubt)
    for site, key, call, leaf in unsure:
        others = [x for x in known[site][call].values() if x.is_sure and x.per_row == leaf.per_row]
        if known[site][call][key].doubt is _DOES_NOT_SHOW and others:
            known[site][call][key] = leaf  # what comes along with it shows it


def is_shared(leaf: Learned) -> bool:
    return leaf.axis is None and leaf.doubt is None


def check_shared(
    tree: Tree, call_with: CallWith, known: Known, around: Known, opened: str | None
) -> None:
    """Put a doubt on every value that is one for all rows and made of them: a mean, a loss."""
    shared = leaves_of(known, is_shared)
    sites = {site for site, *_ in shared}
    try:
        plain, changed = (
            _values(tree, call_with, around, sites, opened, flag) for flag in (False, True)
        )
    except Exception:  # noqa: BLE001 - a model may raise anything where it can't run so
        plain, changed = {}, {}
    for site, key, call, leaf in shared:
        one, other = (
            [*values.get(site, [])[call : call + 1], {}][0] for values in (plain, changed)
        )
        if key in one and key in other and _differ(one[key], other[key]):
            doubt = "it is one for all rows, and made of all of them"
            known[site][call][key] = replace(leaf, doubt=doubt)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return not bool(torch.isclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True).all())


def _values(
    tree: Tree,
    call_with: CallWith,
    known: Known,
    sites: set[Site],
    opened: str | None,
    is_changed: bool,
) -> _Values:
    """The values of `sites` in a real run; with one row changed, wherever one can be."""
    copied = real_twin(tree)
    if is_changed:
        change = partial(_change_inputs, known.get(Site(tree.name, Slot.INPUT), []))
        copied.root.register_forward_pre_hook(change, with_kwargs=True)
    seen = watched(copied, torch.clone, opened, sites)
    if is_changed:
        for path, module in copied.called.items():
            module.register_forward_hook(
                partial(_change_output, known.get(Site(path, Slot.OUTPUT), []))
            )
    with as_if_nothing_ran(tree):
        see_result(seen, tree, call_with(_ROWS)(copied), torch.clone)
    return seen


def _change_inputs(known: list[dict[Key, Learned]], module: Any, args: Any, kwargs: Any) -> Any:
    copied = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    for row in _changed_rows(known, copied):
        is_mask = bool(((row == 0) | (row == 1)).all())
        row.copy_(
            row.flip(-1) * 1.5 + 0.25 if row.is_floating_point() and not is_mask else row.flip(-1)
        )
        if row.dim() == 1 and row.numel() > 1 and bool((row == 1).all()):
            row[0] = 0  # a mask
    return copied


def _change_output(known: list[dict[Key, Learned]], module: Any, args: Any, output: Nest) -> None:
    for row in _changed_rows(known, output):
        if row.is_floating_point():
            row.copy_(row.flip(-1) * 1.5 + 0.25)


def _changed_rows(known: list[dict[Key, Learned]], value: Nest) -> Iterator[Tensor]:
    for key, tensor in named_tensors(value):
        leaf = known[0].get(key) if known else None
        if leaf is None or leaf.axis is None or leaf.per_row != 1 or leaf.doubt is not None:
            continue
        is_expanded = tensor.dim() != leaf.dims or tensor.stride()[leaf.axis] == 0
        if tensor.dim() > 1 and not is_expanded:
            yield tensor.select(leaf.axis, _CHANGED)


def _other_order(leaf: Learned, plain: Tensor, changed: Tensor | None) -> str | None:
    """Why the entries of a tensor are not those of one row behind the other; None if they are."""
    axis = leaf.axis
    assert axis is not None
    if changed is None or plain.shape != changed.shape or plain.shape[axis] % _ROWS:
        return "its size depends on the values"
    rows, others = (x.movedim(axis, 0).reshape(_ROWS, -1) for x in (plain, changed))
    is_same = torch.isclose(rows, others, rtol=1e-4, atol=1e-6, equal_nan=True).all(1).tolist()
    is_changed = not is_same.pop(_CHANGED)
    if not all(is_same):
        return "its entries are not in the order of the rows"
    if is_changed:
        return None
    # Nothing in it follows from the numbers of a row, and the rows were alike: then so are its
    # parts, if they are in the order of the rows.
    is_alike = torch.isclose(rows, rows[:1], rtol=1e-4, atol=1e-6, equal_nan=True).all()
    if bool(is_alike) and len(rows.unique()) > 1:
        return None
    return _DOES_NOT_SHOW
