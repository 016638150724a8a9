"""Run a model as Python, whatever was compiled of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tracekit.capture import warn_user
from tracekit.core.tree import Tree


def eager(tree: Tree) -> AbstractContextManager[Any]:
    """Run compiled parts as Python: hooks placed after a compilation do not fire in it.

    Says so once for each model.
    """
    if not tree.is_compiled():
        return nullcontext()
    own = tree.original or tree  # nobody knows of twins
    if not own.was_told_eager:
        own.was_told_eager = True
        warn_user(
            f"{type(tree.root).__name__} was compiled by torch; under a trace it runs as Python, "
            f"and slower: what is compiled can't be seen or changed. Outside it stays compiled."
        )
    return torch.compiler.set_stance("force_eager")
