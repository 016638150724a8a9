"""Lead values through the modules that stand for them beside the model, where they are wanted."""

from __future__ import annotations

from typing import Any, final

from tracekit.core.tree import Tree
from tracekit.interleave.hooks import Hooks, Subscriber
from tracekit.interleave.passage import Watch


@final
class Leading:
    """The modules at the paths behind `around`, in one run."""

    def __init__(self, around: str, tree: Tree, hooks: Hooks, watches: dict[str, Watch]) -> None:
        self._around = around
        self._modules = tree.modules
        self._hooks = hooks
        self._watches = watches

    def is_wanted(self, name: str) -> bool:
        """Whether anybody has a hook on it, besides the run that counts its calls."""
        path = f"{self._around}.{name}"
        piece, watch = self._modules.get(path), self._watches.get(path)
        if piece is None:
            return False
        placed = len(piece._forward_hooks) + len(piece._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage] - see hooks.py
        return placed > (0 if watch is None or watch.is_asked else 1 + watch.is_full)

    def passed(self, name: str, value: Any) -> Any:
        """What came out of the module; `value`, if nobody wants it: the call is counted alone."""
        path = f"{self._around}.{name}"
        if self.is_wanted(name):
            return self._modules[path](value)
        watch, subscriber = self._watches.get(path), self._hooks.subscriber
        if watch is not None and subscriber is not None:
            counted: Subscriber = subscriber
            counted.before(watch, None)
            counted.after(watch, None)
        return value
