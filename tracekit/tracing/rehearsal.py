"""Runs of a twin that leave no trace: what its modules and operations take and return."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracekit.capture.functions import unwrap
from tracekit.capture.operations import operations_of, with_operations
from tracekit.core.annex import ANNEX, INNER
from tracekit.core.nest import Nest, named_tensors
from tracekit.core.offload import devices_of
from tracekit.core.pieces import Annex, Piece
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.core.twin import twin
from tracekit.interleave.forwards import rewritable
from tracekit.interleave.places import tapped


def watched(
    tree: Tree,
    keep: Callable[[Tensor], Any],
    opened: str | None,
    sites: set[Site] | None = None,
) -> dict[Site, list[dict[Any, Any]]]:
    """What the modules of a twin take and return when it runs, each tensor as `keep` has it.

    Or, if `opened` is a path of what has operations, what these take and return.
    """
    seen: dict[Site, list[dict[Any, Any]]] = {}

    def see(site: Site, value: Nest) -> None:
        if sites is None or site in sites:
            kept = {key: keep(tensor) for key, tensor in named_tensors(value)}
            seen.setdefault(site, []).append(kept)

    def before(site: Site, module: Any, args: Any, kwargs: Any) -> None:
        see(site, (args, kwargs))

    def after(site: Site, module: Any, args: Any, output: Any) -> None:
        see(site, output)

    pieces: list[tuple[str, nn.Module]] = []
    if opened is not None and annex_around(tree, opened) is None:
        _watch_operations(tree, opened, see)
        return seen
    if opened is not None:
        pieces = _tapped(tree, opened)
    for path, module in pieces or tree.called.items():
        takes, returns = Site(path, Slot.INPUT), Site(path, Slot.OUTPUT)
        if sites is None or takes in sites:
            module.register_forward_pre_hook(partial(before, takes), with_kwargs=True)
        if sites is None or returns in sites:
            module.register_forward_hook(partial(after, returns))
    return seen


def annex_around(tree: Tree, path: str) -> str | None:
    """The annex of an attention that `path` is, or that it is in; None for others."""
    module = tree.modules.get(path)
    if isinstance(module, Piece) and module.name in INNER:
        return path
    if isinstance(module, (Annex, Piece)):
        return f"{module.owner}.{ANNEX}"
    return None


def _tapped(tree: Tree, annex: str) -> list[tuple[str, nn.Module]]:
    """The modules in an annex, which are called from now on whenever the attention runs."""
    known = tree.module(annex)
    if isinstance(known, Piece):
        tapped(tree, [annex]).leave()
        return [(annex, known)]
    pieces = [(f"{annex}.{name}", module) for name, module in tree.module(annex).named_children()]
    tapped(tree, [path for path, _ in pieces]).leave()
    return pieces


def module_around(tree: Tree, path: str) -> str | None:
    """The module in whose forward the operation at `path` is; None if a module is there."""
    above = path
    while above not in tree.modules:
        above = above.rpartition(".")[0]
    return None if above == path else above


def _watch_operations(tree: Tree, opened: str, see: Callable[[Site, Nest], None]) -> None:
    """Show `see` the operations of what runs at `opened`: a module, or an operation."""

    def watching(path: str, call: Callable[..., Any]) -> Callable[..., Any]:
        function, rewrap = unwrap(call)
        known = operations_of(function)
        paths = [f"{path}.source.{operation.name}" for operation in known.calls]

        def operate(index: int, called: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            own = paths[index]
            if path == opened:
                see(Site(own, Slot.INPUT), (args, kwargs))
            elif own == opened or opened.startswith(f"{own}."):
                called = watching(own, called)
            output = called(*args, **kwargs)
            if path == opened:
                see(Site(own, Slot.OUTPUT), output)
            return output

        return rewrap(with_operations(function, known, operate))

    around = module_around(tree, opened) or opened
    rewritable(tree.module(around), partial(watching, around))


def see_result(
    seen: dict[Site, Any], tree: Tree, result: Nest, keep: Callable[[Tensor], Any]
) -> None:
    kept = {key: keep(tensor) for key, tensor in named_tensors(result)}
    seen[Site(tree.name, Slot.RESULT)] = [kept]


def real_twin(tree: Tree) -> Tree:
    """A twin with the model's own weights, and copies of all other tensors."""
    return twin(tree, _shared_or_copied, is_of_a_library)


def _shared_or_copied(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def is_of_a_library(hook: Any) -> bool:
    """Whether a hook is part of the model; the user's own would see runs nobody asked for."""
    package = str(getattr(hook, "__module__", "")).partition(".")[0]
    return package in {"torch", "transformers", "accelerate", "peft"}


@contextmanager
def as_if_nothing_ran(tree: Tree) -> Generator[None]:
    """No gradients, and the random numbers that come next stay the same."""
    devices = {device for device in devices_of(tree.root) if device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        yield
