"""Read and write the values that have standard names, where the model has them."""

# What is handed out is a view of the model's own tensor, so an edit in place arrives in the model.
# An assigned value goes into a tensor of the same structure. Where the model goes on with a tensor
# in two ways, as with the residual stream in front of a norm, the name says which is meant:
#   - SHARED: both; what is assigned is written into the tensor;
#   - UNUSED: neither, as the model does not read it again; it is a copy, and not to be assigned;
#   - APART: this module's alone; a copy takes the tensor's place before it is handed out.

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tracekit.architectures import Bound, Lacks, Sharing
from tracekit.core.nest import describe, first_input, first_tensor, misfit, replace_tensor, tensors
from tracekit.core.norms import known_kind, may_be_norm
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.core.versions import changes
from tracekit.errors import (
    LostError,
    MisfitError,
    MissingNameError,
    NeverRanError,
    UnsupportedError,
)
from tracekit.interleave.mediator import Mediator


def read_named(mediator: Mediator, site: Site, call: int, bound: Bound) -> Tensor:
    """The activation, as a view of the tensor that the model goes on with."""
    value = mediator.read(site, call)
    found = tensor_of(bound, value)
    if bound.sharing is Sharing.APART:
        apart = found.clone()
        value = replace_tensor(value, found, apart)
        mediator.write(site, value, call)
        if mediator.keeper is not None:
            mediator.keeper.prepared(value)
        found = apart
    if bound.sharing is Sharing.UNUSED:
        found = found.clone()
        line = mediator.last[1] if mediator.last is not None else "a line before"
        mediator.loans.append(
            partial(_edited_copy, found, changes(found), f"{bound.name} ({line})")
        )
    return bound.view(found)


def _edited_copy(copy: Tensor, version: int, what: str) -> LostError | None:
    """What is wrong with an edit of a value that the model does not read again."""
    if changes(copy) == version:
        return None
    return LostError(
        f"{what} was edited in place, and nothing in the model reads it again, so the edit would "
        f"change nothing: edit router_weights or router_indices, or a .clone() to compute with."
    )


def write_named(mediator: Mediator, site: Site, call: int, bound: Bound, new: object) -> None:
    """Let the model go on with `new` as the activation; MisfitError if it does not fit."""
    if bound.sharing is Sharing.UNUSED:
        raise UnsupportedError(
            f"{bound.name} can't be written: nothing in the model reads what "
            f"{site.path} gives of it."
        )
    value = mediator.read(site, call)
    old = tensor_of(bound, value)
    part = bound.view(old)
    wrong = misfit(new, part, f"{site.path.partition('.')[0]} … {bound.name}")
    if wrong is not None or not isinstance(new, Tensor):
        raise MisfitError(f"{wrong}.")
    if bound.sharing is Sharing.SHARED:
        part.copy_(new)
        return
    whole = new
    if part is not old:
        whole = old.clone()
        bound.view(whole).copy_(new)
    mediator.write(site, replace_tensor(value, old, whole), call)


def tensor_of(bound: Bound, value: Any) -> Tensor:
    """The tensor of a module's value that the activation lies in."""
    if bound.slot is Slot.INPUT:
        found = first_input(value)
        found = found if isinstance(found, Tensor) else first_tensor(value)
    elif bound.key is None:
        found = first_tensor(value)
    else:
        found = list(tensors(value))[bound.key]
    if found is None:
        raise NeverRanError(f"{bound.name} is no tensor here, but {describe(value)}.")
    return found


def attach_inner(tree: Tree, bound: Bound) -> bool:
    """Let there be the module of a value inside another; False if it can't be had."""
    inside, _, name = bound.path.rpartition(".")
    owner = tree.canonical(f"{tree.name}.{inside}")
    path = f"{owner}.{name}"
    if path in tree.inner:
        return True
    module: Any = tree.modules[owner]
    heads = bound.heads if name == "head_result" else 0
    kind = None if name == "head_result" else known_kind(module)
    if kind is None and not heads and not may_be_norm(module):
        return False
    if kind is not None:
        tree.norm_kinds[owner] = kind
    tree.attach_inner(path, heads)
    return True


def read_weight(tree: Tree, path: str, name: str) -> Any:
    """The weight of that standard name in the module at `path`; MissingNameError if it has none."""
    if tree.load_first is not None:
        tree.load_first()
    found = tree.names.weight(tree.below(path), name) if tree.names is not None else None
    if found is None or isinstance(found, Lacks):
        why = found.reason if found is not None else "it is no layer whose names are known"
        raise MissingNameError(
            f"{path} ({type(tree.module(path)).__name__}) has no {name!r}: {why}."
        )
    return found
