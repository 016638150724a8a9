"""A twin runs in the stead of a model: its modules copied, its tensors exchanged."""

# Guarantees:
#   - nothing that happens to a twin happens to the model: not its weights and their gradients,
#     not its buffers, not what its forward keeps on `self`, in whatever thread either runs.

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, final

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tracekit.core.nest import tensors
from tracekit.core.quirks import at_rest
from tracekit.core.shares import check_copyable
from tracekit.core.tree import Tree

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin(
    tree: Tree,
    exchange: Callable[[Tensor], Tensor],
    keeps: Callable[[Any], bool],
    has_weights: bool = True,
) -> Tree:
    """The twin of the model of `tree`, with `exchange(tensor)` for each of its tensors.

    Of the hooks on its modules it has those that `keeps` says yes to, and none of a run that is
    under way. Without `has_weights`, accelerate's hooks bring none. Raises whatever copying a
    module raises that can't be copied.
    """
    check_copyable(tree.root)
    memo: dict[int, Any] = {}
    for module in tree.root.modules():
        state = vars(module)
        for tensor in tensors(state):  # parameters, buffers, and what is neither
            if id(tensor) not in memo:
                memo[id(tensor)] = exchange(tensor)
        offload = state.get("_hf_hook")  # it holds the weights that are not on the model
        if offload is not None:
            memo[id(offload)] = offload if has_weights else at_rest(offload)
        for name in _HOOKS:
            hooks: dict[int, Any] = state[name]
            # PyTorch's keys count up from 0; those below are of tracekit's own runs
            kept = ((key, hook) for key, hook in hooks.items() if key >= 0 and keeps(hook))
            memo[id(hooks)] = OrderedDict(kept)
    found = Tree(copied(tree.root, exchange, memo), tree.name, tree.renames)
    found.original, found.naming = tree, tree.naming
    for owner in tree.annexes:
        found.attach(owner)
    for path, piece in tree.inner.items():
        found.attach_inner(path, piece.heads)
    return found


def copied(
    value: Any, exchange: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None
) -> Any:
    """A deep copy of `value`, with `exchange(tensor)` for each tensor in it."""
    with _Exchange(exchange):
        return copy.deepcopy(value, memo)


@final
class _Exchange(TorchFunctionMode):
    """Answers for tensors that are about to be copied; those inside a graph could not be."""

    def __init__(self, exchange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._exchange = exchange

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), self._exchange(tensor))
