"""The places of a run where it may stop: the model's modules, and operations inside them."""

# An operation is a call that is written in a module's forward, or in a function that is called so.
# It has a path, behind that of the module, and its Watch is told of each call:
#
#     model.h.0.attn.source.split_0
#     model.h.0.attn.source.attention_interface_0.source.softmax_0
#
# Guarantees:
#   - only what was opened is rewritten, in this run alone, on the thread of its forward pass;
#   - what is opened has not begun, so that all its operations are seen from the first on.

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast, final

from torch import nn

from tracekit.capture.functions import unwrap
from tracekit.capture.operations import Listing, operations_of, with_operations
from tracekit.core.annex import INNER
from tracekit.core.pieces import Piece
from tracekit.core.site import Visit
from tracekit.core.tree import Tree
from tracekit.errors import AttentionError, SourceError, UnsupportedError
from tracekit.interleave.forwards import own_forward
from tracekit.interleave.hooks import Hooks, Subscriber, is_elsewhere
from tracekit.interleave.inner import Inner
from tracekit.interleave.passage import Watch
from tracekit.interleave.taps import Tap, Wrap


@final
class Places:
    """The modules of `tree`, and what was opened of them in one run."""

    def __init__(self, tree: Tree, hooks: Hooks) -> None:
        self._tree = tree
        self._hooks = hooks
        self._opened: dict[str, Listing] = {}  # by path: what it ran last
        self._inside: dict[str, list[str]] = {}  # the paths of the operations in what was opened
        self._around: dict[str, str] = {}  # of an operation: what it is in
        self._watches: dict[str, Watch] = {}  # of operations
        self._callees: dict[str, Callable[..., Any]] = {}  # of operations that are being called
        self._taps: dict[str, Tap] = {}  # by the path of the attention
        self._inner: dict[str, Inner] = {}  # by the path of the norm, or projection
        hooks.tap = self.tap

    # -- what Passage needs to know -------------------------------------------------------------

    @property
    def name(self) -> str:
        """The root's path."""
        return self._tree.name

    @property
    def shared(self) -> list[str]:
        """The modules that can be called under several paths."""
        return self._tree.shared

    def called_children(self, path: str) -> list[str]:
        """The nearest modules below `path`, and the operations in it."""
        modules = [] if path in self._around else self._tree.called_children(path)
        return [*modules, *self._inside.get(path, ())]

    def ancestors(self, path: str) -> list[str]:
        """Everything around `path`, nearest first."""
        above: list[str] = []
        while path in self._around:
            path = self._around[path]
            above.append(path)
        return [*above, *self._tree.ancestors(path)]

    def callers(self, path: str) -> list[str]:
        """What calls `path`: of an operation, what it is in."""
        return [self._around[path]] if path in self._around else self._tree.callers(path)

    def is_module(self, path: str) -> bool:
        """Whether a module is at `path`, not an operation."""
        return path not in self._around

    # -- what is put into the model -------------------------------------------------------------

    def watch_ends(self, watch: Watch) -> None:
        """Report the end of every call at the path of `watch`."""
        if watch.path in self._around:
            self._watches[watch.path] = watch
            return
        if type(self._tree.modules.get(watch.path)) is Piece:
            self._watches[watch.path] = watch  # its Tap counts its calls
        self._hooks.watch_ends(watch)

    def watch_begins(self, watch: Watch) -> None:
        """Report the beginning of every call at the path of `watch`; operations always do."""
        if watch.path not in self._around:
            self._hooks.watch_begins(watch)

    def make_skippable(self, path: str) -> None:
        """Let the subscriber answer in place of a module; operations always ask it."""
        if path not in self._around:
            self._hooks.make_skippable(path)

    def show(self, visit: Visit, value: object) -> None:
        """Show the observers a value that their hooks will not be reached with."""
        if visit.site.path not in self._around:
            self._hooks.show(visit, value)

    # -- operations -----------------------------------------------------------------------------

    def opened(self, path: str) -> Listing | None:
        """The operations of what runs at `path`, if it was opened."""
        return self._opened.get(path)

    def open(self, path: str) -> Listing:
        """Make sites of the operations of what runs at `path`; of an operation, of what it calls.

        Raises SourceError where there are none to be had.
        """
        if path in self._around:
            return self._add(path, self._callees[path])
        if path in self._opened:
            return self._opened[path]
        forward = own_forward(self._tree.module(path))
        found = self._add(path, forward)
        if path not in self._taps:  # else it is rewritten already
            self._hooks.rewrite(path, partial(self._rewritten, path))
        return found

    def untapped(self, path: str) -> str | None:
        """The attention that `path` is a value in, if no value of it was asked for so far."""
        piece = self._tree.modules.get(path)
        if type(piece) is not Piece or piece.owner in self._taps or piece.owner in self._inner:
            return None
        return piece.owner

    def tap(self, piece: Piece) -> None:
        """Let the values of an attention go through its annex; AttentionError if that can't be."""
        owner = piece.owner
        if owner in self._taps or owner in self._inner:
            return
        if piece.name in INNER:
            self._inner[owner] = Inner(self._tree, owner, self._hooks, self._watches)
            self._hooks.rewrite(owner, self._inner[owner].around)
            return
        try:
            self._taps[owner] = Tap(self._tree, owner, self._hooks, self._watches)
        except AttentionError:
            self._tree.detach(owner)
            raise
        if owner not in self._opened:
            self._hooks.rewrite(owner, partial(self._rewritten, owner))

    def _add(self, path: str, call: Callable[..., Any]) -> Listing:
        if isinstance(call, nn.Module):
            raise SourceError(self._is_submodule(path, call))
        found = self._opened[path] = operations_of(unwrap(call)[0])
        inside = self._inside.setdefault(path, [])
        for operation in found.calls:
            own = _path(path, operation.name)
            if own in self._tree.modules:
                raise UnsupportedError(f"{own} is the path of a module; its operation has no other")
            if own not in self._around:
                self._around[own] = path
                inside.append(own)
        return found

    def _is_submodule(self, path: str, module: nn.Module) -> str:
        known = [each for each, other in self._tree.modules.items() if other is module]
        if not known:
            return f"{path} calls a {type(module).__name__} that is no part of the model."
        return f"{path} calls the module {known[0]}: write {known[0]}.source instead."

    # -- while the model runs -------------------------------------------------------------------

    def _rewritten(self, path: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which runs at `path`, with its operations reported, and its values led."""
        tap = self._taps.get(path)
        if tap is not None and not tap.is_by_interface and path not in self._opened:
            return tap.around(call)
        function, rewrap = unwrap(call)
        known = operations_of(function)
        paths = [_path(path, operation.name) for operation in known.calls]
        operate = partial(self._operate, paths, {} if tap is None else tap.wraps(function, known))
        rewritten = rewrap(with_operations(function, known, operate))
        return rewritten if tap is None else tap.around(rewritten)

    def _operate(
        self,
        paths: list[str],
        wraps: dict[int, Wrap],
        index: int,
        call: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make one call of a rewritten function."""
        watch = self._watches.get(paths[index])
        subscriber: Subscriber | None = self._hooks.subscriber
        wrap = wraps.get(index)
        if watch is None or subscriber is None or is_elsewhere(self._hooks.thread):
            return call(*args, **kwargs) if wrap is None else wrap(call, call)(*args, **kwargs)
        inputs: object = (args, kwargs)
        self._callees[watch.path] = call
        try:
            inputs = subscriber.before(watch, inputs)
        finally:
            del self._callees[watch.path]
        args, kwargs = cast("tuple[tuple[Any, ...], dict[str, Any]]", inputs)
        request = subscriber.instead(watch)
        if request is not None:
            return subscriber.after(watch, request.value)
        try:
            runs = self._called(watch.path, call, subscriber)
            output = (runs if wrap is None else wrap(call, runs))(*args, **kwargs)
        except BaseException:
            watch.end()  # the model may catch it, and make the call again
            raise
        return subscriber.after(watch, output)

    def _called(
        self, path: str, call: Callable[..., Any], subscriber: Subscriber
    ) -> Callable[..., Any]:
        """What runs in the place of `call`: itself, or a rewritten one if `path` was opened."""
        before = self._opened.get(path)
        if before is None:
            return call
        try:
            if self._add(path, call) is not before:  # another function than the last time
                subscriber.watch_inside(path)
            return self._rewritten(path, call)
        except SourceError:
            return call


def tapped(tree: Tree, paths: Iterable[str]) -> Hooks:
    """Lets values inside attentions go through those of these modules that stand for them.

    In forward passes on this thread, until what is returned is removed.
    """
    hooks = Hooks(tree.module)
    places = Places(tree, hooks)
    for path in paths:
        module = tree.module(path)
        if type(module) is Piece:
            places.tap(module)
    hooks.tap = None
    return hooks


def _path(around: str, name: str) -> str:
    return f"{around}.source.{name}"
