"""Where the rows of a batch lie in every value of a model, learned from runs at two batch sizes."""

# An axis holds the batch if its size grows with it: sizes of one run alone would have to be guessed
# where a sequence is as long as the batch. Runs are dry wherever the model allows it.
#
# Sizes do not tell in which order the rows lie where an axis holds several entries of each: a
# router's `(batch*seq, …)` is in the order of the batch, and what an expert gets is not. So, where
# the weights are there, two real runs that differ in one row tell which entries that row reaches.

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from tracekit.core.dry import DryMode
from tracekit.core.nest import Nest, describe, map_leaves, named_tensors
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.core.twin import twin
from tracekit.errors import RowsError

# Given a number of rows: what runs a model, given by its Tree, on a batch of so many.
CallWith: TypeAlias = "Callable[[int], Callable[[Tree], object]]"

_Key: TypeAlias = "tuple[Any, ...]"  # the way to a tensor in its nest
_Sizes: TypeAlias = "dict[Site, list[dict[_Key, torch.Size]]]"  # of every call, in order
_Values: TypeAlias = "dict[Site, list[dict[_Key, Tensor]]]"

_SIZES = (2, 3)  # batch sizes of the runs that are compared
_ROWS, _CHANGED = 3, 1  # of the runs that differ in one row
_DOES_NOT_SHOW = "which of its entries belong to which row does not show"


class Layout(NamedTuple):
    """The rows lie along `axis`, `per_row` entries for each, one row behind the other."""

    axis: int
    per_row: int


@dataclass(frozen=True)
class _Learned:
    """What is known of one tensor in the values of a site."""

    axis: int | None = None  # None: it has no rows
    dims: int = 0
    per_row: int = 0  # entries for each row, in the runs that it was learned from
    is_sure: bool = True  # in the order of the rows, as far as sizes can tell
    doubt: str | None = None  # why it can't be told
    ones: tuple[int, ...] = ()  # if it has no rows: the axes of size 1, which may be broadcast


_Known: TypeAlias = "dict[Site, list[dict[_Key, _Learned]]]"  # of every call, in order


@final
class Layouts:
    """The layout of every tensor that the modules of one model take and return."""

    def __init__(self, known: _Known, why_not: str | None = None) -> None:
        self._known = known
        self._why_not = why_not

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
        self, site: Site, tensor: Tensor, batch: int, found: _Learned | None
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
        found = tree.layouts[key] = _learn(tree, call_with)
    return found


def _learn(tree: Tree, call_with: CallWith) -> Layouts:
    why_not: str | None = None
    for sizes in (_dry_sizes, _dry_sizes_by_values, _real_sizes):
        try:
            few, many = (sizes(tree, call_with, size) for size in _SIZES)
        except Exception as error:  # noqa: BLE001 - a model may raise anything where it can't run so
            why_not = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            continue
        known = _compared(few, many)
        if sizes is not _dry_sizes:
            _distrust(known, is_real=sizes is _real_sizes)
        if tree.load_first is None:  # else the weights are not there, and shapes alone are seen
            _check_orders(tree, call_with, known)
        return Layouts(known)
    return Layouts({}, why_not)


def _distrust(known: _Known, is_real: bool) -> None:
    """Mark what may depend on values, where a dry run did not work without them."""
    for site, key, call, leaf in _leaves(known):
        if is_real:
            known[site][call][key] = replace(leaf, is_sure=False)
        elif leaf.per_row > 1:
            doubt = "how many of its entries are a row's depends on the values"
            known[site][call][key] = replace(leaf, doubt=doubt)


def _leaves(known: _Known) -> list[tuple[Site, _Key, int, _Learned]]:
    """Every tensor that has rows, and no doubt about them."""
    return [
        (site, key, call, leaf)
        for site, calls in known.items()
        for call, leaves in enumerate(calls)
        for key, leaf in leaves.items()
        if leaf.axis is not None and leaf.doubt is None
    ]


def _cannot_tell(site: Site, tensor: Tensor, why: str) -> RowsError:
    return RowsError(
        f"{site} ({describe(tensor)}) can't be divided into the rows of each invoke: {why}. "
        f"Ask for it in an invoke() without input, which sees the whole batch, or trace the inputs "
        f"one by one."
    )


# -- sizes at two batch sizes ----------------------------------------------------------------------


def _dry_sizes(tree: Tree, call_with: CallWith, rows: int, knows_integers: bool = False) -> _Sizes:
    run, mode = call_with(rows), DryMode(knows_integers)
    copied = twin(tree, mode.fake_tensor, _is_of_a_library, has_weights=False)
    copied.root.register_forward_pre_hook(partial(_faked, mode), with_kwargs=True)
    seen = _watched(copied, _size)
    with mode, torch.no_grad():
        _see_result(seen, tree, run(copied), _size)
    return seen


def _faked(mode: DryMode, module: Any, args: Any, kwargs: Any) -> Any:
    return mode.fake((args, kwargs))


_dry_sizes_by_values = partial(_dry_sizes, knows_integers=True)


def _real_sizes(tree: Tree, call_with: CallWith, rows: int) -> _Sizes:
    copied = _real_twin(tree)
    seen = _watched(copied, _size)
    with _as_if_nothing_ran(tree):
        _see_result(seen, tree, call_with(rows)(copied), _size)
    return seen


def _size(tensor: Tensor) -> torch.Size:
    return tensor.shape


def _compared(few: _Sizes, many: _Sizes) -> _Known:
    known: _Known = {}
    for site in few.keys() | many.keys():
        one, other = few.get(site, []), many.get(site, [])
        if len(one) == len(other):
            known[site] = [_call(*sizes) for sizes in zip(one, other, strict=True)]
        else:
            doubt = _Learned(doubt="how often its module is called depends on the values")
            known[site] = [{key: doubt for call in (*one, *other) for key in call}]
    return known


def _call(few: dict[_Key, torch.Size], many: dict[_Key, torch.Size]) -> dict[_Key, _Learned]:
    return {
        key: _by_two_sizes(few[key], many[key])
        if key in few and key in many
        else _Learned(doubt="whether it is there depends on the batch")
        for key in few | many
    }


def _by_two_sizes(few: torch.Size, many: torch.Size) -> _Learned:
    if len(few) != len(many):
        return _Learned(doubt="how many axes it has depends on the batch")
    n, m = _SIZES
    grown = [axis for axis, (a, b) in enumerate(zip(few, many, strict=True)) if a != b]
    if not grown:
        ones = tuple(axis for axis, size in enumerate(few) if size == 1)
        return _Learned(None, len(few), ones=ones)
    if len(grown) > 1:
        return _Learned(doubt=f"its axes {grown} all grow with the batch")
    axis = grown[0]
    if few[axis] * m != many[axis] * n or few[axis] % n:
        return _Learned(doubt=f"its axis {axis} does not grow as the batch does")
    per_row = few[axis] // n
    return _Learned(axis, len(few), per_row, is_sure=per_row == 1)


# -- the order of rows, by two real runs -----------------------------------------------------------


def _check_orders(tree: Tree, call_with: CallWith, known: _Known) -> None:
    """Put a doubt on every value in which a row reaches other entries than its own."""
    unsure = [found for found in _leaves(known) if not found[3].is_sure]
    if not unsure:
        return
    sites = {site for site, *_ in unsure}
    try:
        plain, changed = (_values(tree, call_with, known, sites, flag) for flag in (False, True))
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


def _values(
    tree: Tree, call_with: CallWith, known: _Known, sites: set[Site], is_changed: bool
) -> _Values:
    """The values of `sites` in a real run; with one row changed, wherever one can be."""
    copied = _real_twin(tree)
    if is_changed:
        change = partial(_change_inputs, known.get(Site(tree.name, Slot.INPUT), []))
        copied.root.register_forward_pre_hook(change, with_kwargs=True)
    seen = _watched(copied, torch.clone, sites)
    if is_changed:
        for path, module in copied.called.items():
            module.register_forward_hook(
                partial(_change_output, known.get(Site(path, Slot.OUTPUT), []))
            )
    with _as_if_nothing_ran(tree):
        _see_result(seen, tree, call_with(_ROWS)(copied), torch.clone)
    return seen


def _change_inputs(known: list[dict[_Key, _Learned]], module: Any, args: Any, kwargs: Any) -> Any:
    copied = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    for row in _changed_rows(known, copied):
        row.copy_(row.flip(-1))
        if row.dim() == 1 and row.numel() > 1 and bool((row == 1).all()):
            row[0] = 0  # a mask
    return copied


def _change_output(known: list[dict[_Key, _Learned]], module: Any, args: Any, output: Nest) -> None:
    for row in _changed_rows(known, output):
        if row.is_floating_point():
            row.copy_(row.flip(-1) * 1.5 + 0.25)


def _changed_rows(known: list[dict[_Key, _Learned]], value: Nest) -> Iterator[Tensor]:
    for key, tensor in named_tensors(value):
        leaf = known[0].get(key) if known else None
        if leaf is None or leaf.axis is None or leaf.per_row != 1 or leaf.doubt is not None:
            continue
        is_expanded = tensor.dim() != leaf.dims or tensor.stride()[leaf.axis] == 0
        if tensor.dim() > 1 and not is_expanded:
            yield tensor.select(leaf.axis, _CHANGED)


def _other_order(leaf: _Learned, plain: Tensor, changed: Tensor | None) -> str | None:
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


# -- runs that leave no trace ----------------------------------------------------------------------


def _watched(
    tree: Tree, keep: Callable[[Tensor], Any], sites: set[Site] | None = None
) -> dict[Site, list[dict[_Key, Any]]]:
    """What the modules of a twin take and return when it runs, each tensor as `keep` has it."""
    seen: dict[Site, list[dict[_Key, Any]]] = {}

    def see(site: Site, value: Nest) -> None:
        kept = {key: keep(tensor) for key, tensor in named_tensors(value)}
        seen.setdefault(site, []).append(kept)

    def before(site: Site, module: Any, args: Any, kwargs: Any) -> None:
        see(site, (args, kwargs))

    def after(site: Site, module: Any, args: Any, output: Any) -> None:
        see(site, output)

    for path, module in tree.called.items():
        takes, returns = Site(path, Slot.INPUT), Site(path, Slot.OUTPUT)
        if sites is None or takes in sites:
            module.register_forward_pre_hook(partial(before, takes), with_kwargs=True)
        if sites is None or returns in sites:
            module.register_forward_hook(partial(after, returns))
    return seen


def _see_result(
    seen: dict[Site, Any], tree: Tree, result: Nest, keep: Callable[[Tensor], Any]
) -> None:
    kept = {key: keep(tensor) for key, tensor in named_tensors(result)}
    seen[Site(tree.name, Slot.RESULT)] = [kept]


def _real_twin(tree: Tree) -> Tree:
    """A twin with the model's own weights, and copies of all other tensors."""
    return twin(tree, _shared_or_copied, _is_of_a_library)


def _shared_or_copied(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _is_of_a_library(hook: Any) -> bool:
    """Whether a hook is part of the model; the user's own would see runs nobody asked for."""
    package = str(getattr(hook, "__module__", "")).partition(".")[0]
    return package in {"torch", "transformers", "accelerate", "peft"}


@contextmanager
def _as_if_nothing_ran(tree: Tree) -> Generator[None]:
    """No gradients, and the random numbers that come next stay the same."""
    devices = {w.device for w in tree.root.parameters() if w.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        yield
