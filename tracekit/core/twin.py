"""A twin runs in the stead of a model: its modules copied, its tensors exchanged."""

# Guarantees:
#   - nothing that happens to a twin happens to the model: not its weights and their gradients,
#     not its buffers, not what its forward keeps on `self`, in whatever thread either runs.

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tracekit.core.nest import tensors
from tracekit.core.tree import Tree

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin(tree: Tree, exchange: Callable[[Tensor], Tensor], keeps: Callable[[Any], bool]) -> Tree:
    """The twin of the model of `tree`, with `exchange(tensor)` for each of its tensors.

    Of the hooks on its modules it has those that `keeps` says yes to. Raises whatever copying a
    module raises that can't be copied.
    """
    memo: dict[int, Any] = {}
    for module in tree.root.modules():
        state = vars(module)
        for tensor in tensors(state):  # parameters, buffers, and what is neither
            if id(tensor) not in memo:
                memo[id(tensor)] = exchange(tensor)
        for name in _HOOKS:
            hooks: dict[int, Any] = state[name]
            kept = ((key, hook) for key, hook in hooks.items() if keeps(hook))
            memo[id(hooks)] = OrderedDict(kept)
    return Tree(copy.deepcopy(tree.root, memo), tree.name)
