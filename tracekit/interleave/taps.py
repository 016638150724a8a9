"""Where an attention makes the call that its values are taken from, and who wants them in a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, TypeAlias, final

from torch import nn

from tracekit.capture.functions import unwrap
from tracekit.capture.operations import Listing, operations_of
from tracekit.core.annex import ANNEX
from tracekit.core.tree import Tree
from tracekit.errors import AttentionError, SourceError
from tracekit.interleave.attend import attend
from tracekit.interleave.forwards import own_forward
from tracekit.interleave.hooks import Hooks, Subscriber, is_elsewhere
from tracekit.interleave.passage import Watch

# Makes of what is called, and of what runs in its place, what is to be called.
Wrap: TypeAlias = "Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]"


@final
class Tap:
    """The attention at the path `owner`, in one run; AttentionError if it can't be tapped."""

    def __init__(self, tree: Tree, owner: str, hooks: Hooks, watches: dict[str, Watch]) -> None:
        check_tappable(tree, owner)
        self._annex = f"{owner}.{ANNEX}"
        self._modules = tree.modules
        self._hooks = hooks
        self._watches = watches

    def wraps(self, function: FunctionType, known: Listing) -> dict[int, Wrap]:
        """By the index of the call of an attention function in `known`, what is put around it."""
        eager = _eager_of(function)
        return {index: partial(self._wrapped, eager) for index in _attention_calls(known)}

    def _wrapped(
        self, eager: Callable[..., Any], call: Callable[..., Any], runs: Callable[..., Any]
    ) -> Callable[..., Any]:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if is_elsewhere(self._hooks.thread):
                return runs(*args, **kwargs)
            return attend(self, eager, call, runs, args, kwargs)

        return tapped

    # -- as Pieces ------------------------------------------------------------------------------

    def is_wanted(self, name: str) -> bool:
        """Whether anybody has a hook on it, besides the run that counts its calls."""
        path = f"{self._annex}.{name}"
        piece, watch = self._modules[path], self._watches.get(path)
        placed = len(piece._forward_hooks) + len(piece._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage] - see hooks.py
        return placed > (0 if watch is None or watch.is_asked else 1 + watch.is_full)

    def passed(self, name: str, value: Any) -> Any:
        """What came out of the module; `value`, if nobody wants it: the call is counted alone."""
        path = f"{self._annex}.{name}"
        if self.is_wanted(name):
            return self._modules[path](value)
        watch, subscriber = self._watches.get(path), self._hooks.subscriber
        if watch is not None and subscriber is not None:
            counted: Subscriber = subscriber
            counted.before(watch, None)
            counted.after(watch, None)
        return value


def is_attention(module: nn.Module) -> bool:
    """Whether it calls itself one."""
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and not hasattr(module, ANNEX)


def is_tappable(tree: Tree, path: str) -> bool:
    """Whether the module at `path` is an attention whose values can be had."""
    try:
        check_tappable(tree, path)
    except AttentionError:
        return False
    return f"{path}.{ANNEX}" not in tree.called


def check_tappable(tree: Tree, path: str) -> None:
    """Raise AttentionError if the module at `path` makes no call of an attention function."""
    module = tree.module(path)
    try:
        function, _ = unwrap(own_forward(module))
        calls = _attention_calls(operations_of(function))
    except SourceError as error:
        raise AttentionError(f"{path}.{ANNEX} can't be had: {error.args[0]}") from error
    if not calls or _eager_of(function) is None:
        raise AttentionError(
            f"{path}.{ANNEX} can't be had: the forward of {type(module).__name__} makes no call of "
            f"an attention function; ask the module that does, as in "
            f"model.transformer.h[0].attn.{ANNEX}.pattern."
        )


def _attention_calls(known: Listing) -> list[int]:
    calls = enumerate(known.calls)
    return [index for index, call in calls if call.text.startswith("attention_interface(")]


def _eager_of(function: FunctionType) -> Any:
    return function.__globals__.get("eager_attention_forward")
