"""Where the rows of a batch lie in every value of a model, learned from runs at two batch sizes."""

# An axis holds the batch if its size grows with it: sizes of one run alone would have to be guessed
# where a sequence is as long as the batch. Runs are dry wherever the model allows it.
#
# Sizes do not tell in which order the rows lie where an axis holds several entries of each: a
# router's `(batch*seq, …)` is in the order of the batch, and what an expert gets is not. Nor do
# they tell a table that is one for all rows from a mean of them. So, where the weights are there,
# two real runs tell what follows from which row (orders.py).

from __future__ import annotations

from collections.abc import Hashable
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from tracekit.core.dry import DryMode
from tracekit.core.nest import Nest, describe, named_tensors
from tracekit.core.site import Site
from tracekit.core.tree import Tree
from tracekit.core.twin import twin
from tracekit.errors import RowsError
from tracekit.tracing.orders import (
    CallWith,
    Key,
    Known,
    Learned,
    check_orders,
    check_shared,
    is_shared,
    leaves_of,
)
from tracekit.tracing.rehearsal import (
    annex_around,
    as_if_nothing_ran,
    is_of_a_library,
    module_around,
    real_twin,
    see_result,
    watched,
)

_Sizes: TypeAlias = "dict[Site, list[dict[Key, torch.Size]]]"  # of every call, in order

_SIZES = (2, 3)  # batch sizes of the runs that are compared


class Layout(NamedTuple):
    """The rows lie along `axis`, `per_row` entries for each, one row behind the other."""

    axis: int
    per_row: int


@final
class Layouts:
    """The layout of every tensor that the modules of one model take and return."""

    def __init__(self, known: Known, why_not: str | None = None) -> None:
        self._known = known
        self._why_not = why_not
        self._opened: set[str] = set()  # the paths whose operations were learned
        self._knows_shared = False  # which values of modules are made of all rows
        self._learned: set[Site] = set()  # of which there is nothing more to learn

    def learn(self, tree: Tree, call_with: CallWith, site: Site) -> None:
        """Learn of the operations beside `site`, if it is one that nobody has asked for before.

        The model of `tree` may be running: what transformers collects then is left alone.
        """
        if site in self._learned or tree.original is not None or not self._known:
            return
        if tree.load_first is None:
            self._learned.add(site)
        annex = annex_around(tree, site.path)
        opened = annex or site.path.rpartition(".source.")[0]
        if annex is None and module_around(tree, site.path) is None:
            self._learn_of_shared(tree, call_with, site)
        elif opened not in self._opened:
            self._opened.add(opened)
            learned, _ = Context().run(_learned, tree, call_with, opened, self._known)
            self._known.update({**learned, **self._known})

    def _learn_of_shared(self, tree: Tree, call_with: CallWith, site: Site) -> None:
        """Two real runs, once and only if needed: is what is one for all rows made of them?"""
        leaves = (leaf for call in self._known.get(site, ()) for leaf in call.values())
        if self._knows_shared or tree.load_first is not None or not any(map(is_shared, leaves)):
            return
        self._knows_shared = True
        Context().run(check_shared, tree, call_with, self._known, self._known, None)

    def of(self, site: Site, value: Nest, batch: int, call: int = 0) -> list[Layout | None]:
        """One for each tensor of `value`, in the order of `tensors()`; None for what has no rows.

        Raises RowsError where that can't be told.
        """
        calls = self._known.get(site, [])
        known = calls[call if call < len(calls) else -1] if calls else {}
        return [
            self._layout(site, tensor, batch, known.get(key))
            for key, tensor in named_tensors(value)
        ]

    def _layout(
        self, site: Site, tensor: Tensor, batch: int, found: Learned | None
    ) -> Layout | None:
        if found is None:
            return self._by_size(site, tensor, batch)
        if found.doubt is not None:
            raise _cannot_tell(site, tensor, found.doubt)
        if found.axis is None:
            is_same_rank = batch > 1 and tensor.dim() == found.dims
            if is_same_rank and any(tensor.shape[axis] == batch for axis in found.ones):
                why = f"it held one entry for all rows before, and now {batch}"
                raise _cannot_tell(site, tensor, why)
            return None
        size = tensor.shape[found.axis] if tensor.dim() == found.dims else 0
        if not size or size % batch:
            why = f"it does not hold {batch} rows along axis {found.axis}, as it did before"
            raise _cannot_tell(site, tensor, why)
        return Layout(found.axis, size // batch)

    def _by_size(self, site: Site, tensor: Tensor, batch: int) -> Layout | None:
        """The layout of what was not seen before, where its sizes leave one answer only.

        At a new site, what has no axis for the rows may be theirs still: a mean over the batch.
        """
        axes = [axis for axis, size in enumerate(tensor.shape) if size and size % batch == 0]
        if isinstance(tensor, nn.Parameter) or (site in self._known and not axes):
            return None
        if axes == [0] and tensor.shape[0] == batch:
            return Layout(0, 1)
        no_runs = f"the model can't be run on two batch sizes ({self._why_not})"
        why = no_runs if self._why_not else "it is new"
        raise _cannot_tell(site, tensor, f"{why}, and the sizes alone leave it open")


def layouts_of(tree: Tree, call_with: CallWith, kind: Hashable = None) -> Layouts:
    """Learn the layouts of the model of `tree`, or find what was learned of it before.

    `call_with(n)` gives what runs a model on n times the same row: a function of the Tree to run,
    which is a twin of this one. `kind` tells apart calls that take different ways through the
    model, as with images and without.
    """
    tree = tree.original or tree
    tree.refresh_if_changed()
    key = (kind, tree.root.training, tree.is_empty())
    found: Any = tree.layouts.get(key)
    if found is None:
        found = tree.layouts[key] = Layouts(*_learned(tree, call_with))
    return found


def _learned(
    tree: Tree, call_with: CallWith, opened: str | None = None, around: Known | None = None
) -> tuple[Known, str | None]:
    """Of all modules, or of the operations of `opened`; and why nothing was, if so.

    `around` is what is known of all modules, if these are not.
    """
    why_not: str | None = None
    for sizes in (_dry_sizes, _dry_sizes_by_values, _real_sizes):
        try:
            few, many = (sizes(tree, call_with, size, opened) for size in _SIZES)
        except Exception as error:  # noqa: BLE001 - a model may raise anything where it can't run so
            why_not = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            continue
        known = _compared(few, many)
        if sizes is not _dry_sizes:
            _distrust(known, is_real=sizes is _real_sizes)
        if tree.load_first is None:  # else the weights are not there, and shapes alone are seen
            around = {**known, **(around or {})}
            check_orders(tree, call_with, known, around, opened)
            if opened is not None:
                check_shared(tree, call_with, known, around, opened)
        return known, None
    return {}, why_not


def _distrust(known: Known, is_real: bool) -> None:
    """Mark what may depend on values, where a dry run did not work without them."""
    for site, key, call, leaf in leaves_of(known):
        if is_real:
            known[site][call][key] = replace(leaf, is_sure=False)
        elif leaf.per_row > 1:
            doubt = "how many of its entries are a row's depends on the values"
            known[site][call][key] = replace(leaf, doubt=doubt)


def _cannot_tell(site: Site, tensor: Tensor, why: str) -> RowsError:
    return RowsError(
        f"{site} ({describe(tensor)}) can't be divided into the rows of each invoke: {why}. "
        f"Ask for it in an invoke() without input, which sees the whole batch, or trace the inputs "
        f"one by one."
    )


# -- sizes at two batch sizes ----------------------------------------------------------------------


def _dry_sizes(
    tree: Tree,
    call_with: CallWith,
    rows: int,
    opened: str | None = None,
    knows_integers: bool = False,
) -> _Sizes:
    run, mode = call_with(rows), DryMode(knows_integers)
    copied = twin(tree, mode.fake_tensor, is_of_a_library, has_weights=False)
    copied.root.register_forward_pre_hook(partial(_faked, mode), with_kwargs=True)
    seen = watched(copied, _size, opened)
    with mode, torch.no_grad():
        see_result(seen, tree, run(copied), _size)
    return seen


def _faked(mode: DryMode, module: Any, args: Any, kwargs: Any) -> Any:
    return mode.fake((args, kwargs))


_dry_sizes_by_values = partial(_dry_sizes, knows_integers=True)


def _real_sizes(tree: Tree, call_with: CallWith, rows: int, opened: str | None = None) -> _Sizes:
    copied = real_twin(tree)
    seen = watched(copied, _size, opened)
    with as_if_nothing_ran(tree):
        see_result(seen, tree, call_with(rows)(copied), _size)
    return seen


def _size(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _compared(few: _Sizes, many: _Sizes) -> Known:
    known: Known = {}
    for site in few.keys() | many.keys():
        one, other = few.get(site, []), many.get(site, [])
        if len(one) == len(other):
            known[site] = [_call(*sizes) for sizes in zip(one, other, strict=True)]
        else:
            doubt = Learned(doubt="how often its module is called depends on the values")
            known[site] = [{key: doubt for call in (*one, *other) for key in call}]
    return known


def _call(few: dict[Key, torch.Size], many: dict[Key, torch.Size]) -> dict[Key, Learned]:
    return {
        key: _by_two_sizes(few[key], many[key])
        if key in few and key in many
        else Learned(doubt="whether it is there depends on the batch")
        for key in few | many
    }


def _by_two_sizes(few: torch.Size, many: torch.Size) -> Learned:
    if len(few) != len(many):
        return Learned(doubt="how many axes it has depends on the batch")
    n, m = _SIZES
    grown = [axis for axis, (a, b) in enumerate(zip(few, many, strict=True)) if a != b]
    if not grown:
        ones = tuple(axis for axis, size in enumerate(few) if size == 1)
        return Learned(None, len(few), ones=ones)
    if len(grown) > 1:
        return Learned(doubt=f"its axes {grown} all grow with the batch")
    axis = grown[0]
    if few[axis] * m != many[axis] * n or few[axis] % n:
        return Learned(doubt=f"its axis {axis} does not grow as the batch does")
    per_row = few[axis] // n
    return Learned(axis, len(few), per_row, is_sure=per_row == 1)
