"""A model that goes round its first layers: it shares all else with the model it is made of."""

# Guarantees:
#   - what is gone round is never called, so none of its hooks fires, and nothing in it computes;
#   - the model itself is not touched: other threads may run it meanwhile.
#
# Modules on the way down to what is gone round are copied, without what is in them; so are these
# modules, as a loop over the layers may count them, or ask each of what kind it is.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from tracekit.core.nest import replace_tensor
from tracekit.core.offload import go_through_accelerate, is_accelerates
from tracekit.core.quirks import HOOK_DICTS, own_children
from tracekit.core.shares import check_copyable
from tracekit.core.tree import Tree

# What a module does when it is called, given its own call: `call(own, args, kwargs)`.
Call: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
Value: TypeAlias = Callable[[], Tensor]  # what a run is given, told when it comes to it


def detour(tree: Tree, calls: Mapping[str, Call], gone: Iterable[str]) -> Tree:
    """The tree of a model in which the modules at these paths do that when they are called.

    Of them, those `gone` are no part of what runs.
    """
    check_copyable(tree.root)
    copies = {tree.modules[path]: _called_so(tree.modules[path], calls[path]) for path in calls}
    found = Tree(_around(tree.root, copies), tree.name, tree.renames)
    found.original, found.naming, found.mode = tree.original or tree, tree.naming, tree.mode
    found.gone, found.overwrites = tuple(gone), tree.overwrites
    found.was_told_eager = tree.was_told_eager
    for owner in tree.annexes:
        found.attach(owner)
    for path, piece in tree.inner.items():
        found.attach_inner(path, piece.heads)
    found.norm_kinds.update(tree.norm_kinds)
    if tree.names is not None:
        found.learn(tree.names)
    return found


def passing(size: int = 0) -> Call:
    """Hand the first tensor on, in a tuple of that size if the module returns one."""

    def handed_on(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _returned(_first(args, kwargs), size)

    return handed_on


def giving(value: Value, size: int = 0) -> Call:
    """Return `value`, whatever comes."""
    return lambda own, args, kwargs: _returned(value(), size)


def embedding(like: Value) -> Call:
    """Add nothing: ids become a zero, and what is embedded already goes on."""

    def embedded(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = _first(args, kwargs)
        is_embedded = isinstance(first, Tensor) and first.is_floating_point() and first.dim() > 2
        return first if is_embedded else like().new_zeros(())

    return embedded


def entering(value: Value) -> Call:
    """Run the module on `value` instead of the first tensor that it is given."""

    def entered(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = replace_tensor((args, kwargs), _first(args, kwargs), value())
        return own(*args, **kwargs)

    return entered


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _returned(value: Any, size: int) -> Any:
    return (value, *[None] * (size - 1)) if size else value


def _around(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """`module` with the copies in it; itself, if it has none of them."""
    if module in copies:
        return copies[module]
    copies[module] = module
    inside = {
        name: None if child is None else _around(child, copies)
        for name, child in own_children(module).items()
    }
    if any(child is not inside[name] for name, child in own_children(module).items()):
        copies[module] = _copied(module, type(module))
        vars(copies[module])["_modules"] = inside
    return copies[module]


def _called_so(module: nn.Module, call: Call) -> nn.Module:
    kind = type(module)

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(lambda *a, **k: kind.__call__(self, *a, **k), args, kwargs)

    return _copied(module, type(kind.__name__, (kind,), {"__call__": called}))


def _copied(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module with the same weights and parts, whose hooks are a dictionary of their own."""
    copied = object.__new__(kind)
    state = vars(copied)
    state.update(vars(module))
    for name in ("forward", "_old_forward"):  # that of a run under way, and of the module itself
        state.pop(name, None)
    if is_accelerates(module):
        go_through_accelerate(copied, module)
    for (
        name
    ) in HOOK_DICTS:  # PyTorch's keys count up from 0; those below are of tracekit's own runs
        hooks: dict[int, Any] = state[name]
        state[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key >= 0)
    return copied
