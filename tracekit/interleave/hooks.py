"""Put PyTorch hooks on modules for one run, in tiers, and take every one of them off again."""

# Guarantees:
#   - edits of positions come before interventions, in the order in which they were made;
#   - interventions come before the user's own hooks, observers after them: so transformers' own
#     capture (output_hidden_states) sees an edit, and a cache sees what the model goes on with;
#   - a hook acts only on the thread whose forward pass this run is: traces in other threads,
#     nested traces and modules called in the block do not meet it (observers check it themselves,
#     with is_elsewhere);
#   - after remove() the model is as it was.
#
# Hooks are put straight into the dictionaries that register_forward_hook fills: the handles that
# it makes (with weak references, for the garbage collector to follow) would cost more than the
# recording itself, and a cache of all modules would miss its row in benchmarks/overhead.py.

# pyright: reportPrivateUsage=false
# The dictionaries of hooks are private by name, and have kept their names since torch 2.0.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeAlias, final

from torch import nn

from tracekit.core.pieces import Piece
from tracekit.core.quirks import NO_BACKWARD, current_backward
from tracekit.core.site import Slot, Visit
from tracekit.interleave.forwards import Body, rewritable, skippable
from tracekit.interleave.passage import Watch
from tracekit.interleave.protocol import Skip
from tracekit.interleave.worker import this_thread

# A hook as PyTorch calls it: `(module, args, output)`, or `(module, args, kwargs)` before the call.
ForwardHook: TypeAlias = Callable[[nn.Module, Any, Any], None]


class Together(Protocol):
    """Shows hooks whole values, of a model that lies on several ranks (an Assembly)."""

    def seen(self, module: nn.Module, slot: Slot, hook: ForwardHook) -> ForwardHook: ...
    def edited(
        self, module: nn.Module, slot: Slot, change: Callable[[Any], Any]
    ) -> Callable[[Any], Any]: ...
    def on_whole(self, path: str, call: Any, value: Any) -> tuple[Any, Any]: ...


class Subscriber(Protocol):
    """Whoever stands between a module and its caller (an Interleaver)."""

    def before(self, watch: Watch, inputs: object) -> object: ...
    def instead(self, watch: Watch) -> Skip | None: ...
    def after(self, watch: Watch, output: object) -> object: ...
    def watch_inside(self, path: str) -> None: ...


_keys = count(-1, -1)  # PyTorch's own keys count up from 0


@final
class Hooks:
    """The hooks of one run on one model."""

    def __init__(self, module: Callable[[str], nn.Module], thread: int | None = None) -> None:
        self._module = module
        self.thread = this_thread() if thread is None else thread  # where the model runs
        self._placed: list[tuple[dict[int, Any], int]] = []
        self._watches: dict[str, Watch] = {}
        self._skippables: dict[str, Callable[[], None]] = {}  # what takes each of them back
        self._rewritten: list[Callable[[], None]] = []
        self._observers: list[tuple[list[nn.Module], Slot, ForwardHook]] = []
        self._edits: list[tuple[Any, int]] = []  # the dictionary that each is in, and its key
        self.ranks: Together | None = None  # those of the model, if there are several
        self.subscriber: Any = None  # a Subscriber from the start of the run to its end
        self.tap: Callable[[Piece], None] | None = None  # lets a value go through its piece

    # -- INTERVENTION ---------------------------------------------------------------------------

    def watch_ends(self, watch: Watch) -> None:
        """Report the end of every call of the module of `watch` to the subscriber."""
        self._watches[watch.path] = watch
        hook = partial(_after, self.thread, self.subscriber, watch)
        self._put(self._reached(self._module(watch.path))._forward_hooks, hook, is_first=True)

    def watch_begins(self, watch: Watch) -> None:
        """Report the beginning of every call of the module of `watch` to the subscriber."""
        hook = partial(_before, self.thread, self.subscriber, watch)
        self._put_before(self._module(watch.path), hook, is_first=True)

    def make_skippable(self, path: str) -> None:
        """Let the subscriber answer in place of the module at `path`.

        PyTorch's hooks can't keep a module from running, so its `forward` is replaced for the
        run: on the instance, where accelerate and tensor parallelism put theirs as well.
        """
        if path not in self._skippables:
            answer = partial(_instead, self.thread, self.subscriber, self._watches[path])
            self._skippables[path] = skippable(self._module(path), answer)

    def rewrite(self, path: str, body: Body) -> None:
        """Ask `body`, on the thread of the forward pass, what the module at `path` is to run."""
        asked = partial(_here, self.thread, body)
        self._rewritten.append(rewritable(self._module(path), asked))

    def look_at_inputs(self, module: nn.Module, hook: ForwardHook) -> None:
        """Let `hook` see what `module` is called with; nothing may change it yet."""
        self._put_before(self._reached(module), hook, is_first=True)

    def look_at_output(
        self, module: nn.Module, begin: Callable[[nn.Module, Any], None], hook: ForwardHook
    ) -> None:
        """Let `begin` know of each call, and `hook` see what `module` returned."""
        key = self._put(self._reached(module)._forward_pre_hooks, begin, is_first=True)
        self._put(module._forward_hooks, hook, is_first=True, key=key)

    # -- EDIT -----------------------------------------------------------------------------------

    def edit(self, path: str, slot: Slot, change: Callable[[Any], Any]) -> None:
        """Let the model go on with `change(value)`, which the interventions see then."""
        module = self._reached(self._module(path))
        if self.ranks is not None:
            change = self.ranks.edited(module, slot, change)
        if slot is Slot.OUTPUT:
            hook: Any = partial(_edited_output, self.thread, change)
            where, key = module._forward_hooks, self._put(module._forward_hooks, hook, True)
        else:
            hook = partial(_edited_inputs, self.thread, change)
            where, key = module._forward_pre_hooks, self._put_before(module, hook, True)
        self._edits.append((where, key))
        self._put_edits_first(where)

    def _put_edits_first(self, where: Any) -> None:
        for other, key in reversed(self._edits):
            if other is where:
                where.move_to_end(key, last=False)

    # -- OBSERVER -------------------------------------------------------------------------------

    def observe(self, modules: list[nn.Module], slot: Slot, hook: ForwardHook) -> None:
        """Let `hook` see the outputs of `modules` as the model goes on with them, or the inputs.

        It is called for every call of them, of other runs too, and checks `is_elsewhere` itself.
        """
        for module in modules:
            if type(module) is Piece:
                self._reached(module)
            own = hook if self.ranks is None else self.ranks.seen(module, slot, hook)
            if slot is Slot.OUTPUT:
                self._put(module._forward_hooks, own)
            else:
                self._put_before(module, own)
        self._observers.append((modules, slot, hook))

    def module_at(self, path: str) -> nn.Module:
        """The module that hooks are put on for a path."""
        return self._module(path)

    def show(self, visit: Visit, value: Any) -> None:
        """Show the observers of a site a value that their hooks will not be reached with."""
        module = self._module(visit.site.path)
        for modules, slot, hook in self._observers:
            if slot is visit.site.slot and module in modules:
                hook(module, *value) if slot is Slot.INPUT else hook(module, (), value)

    # -- on and off -----------------------------------------------------------------------------

    def remove(self) -> None:
        """Take everything off the model."""
        for where, key in reversed(self._placed):
            where.pop(key, None)
        for undo in (*self._skippables.values(), *self._rewritten):
            undo()
        self._skippables.clear()
        for held in (self._placed, self._watches, self._rewritten, self._observers, self._edits):
            held.clear()
        self.subscriber = self.tap = self.ranks = None

    def leave(self) -> None:
        """Let go of all that was put on, which stays: the model is thrown away."""
        self._rewritten.clear()
        self.tap = None

    def _reached(self, module: nn.Module) -> nn.Module:
        """`module`, which is called in this run also if it only stands for a value."""
        if type(module) is Piece and self.tap is not None:
            self.tap(module)
        return module

    def _put_before(self, module: nn.Module, hook: Any, is_first: bool = False) -> int:
        # The mark before the hook, and off after it: another thread may call the module meanwhile.
        key = self._put(module._forward_pre_hooks_with_kwargs, True)
        return self._put(module._forward_pre_hooks, hook, is_first, key)

    def _put(self, where: Any, what: Any, is_first: bool = False, key: int | None = None) -> int:
        key = next(_keys) if key is None else key
        self._placed.append((where, key))  # noted first: Ctrl-C may come behind any line
        where[key] = what
        if is_first and len(where) > 1:
            where.move_to_end(key, last=False)
            if self._edits:
                self._put_edits_first(where)
        return key


def is_elsewhere(thread: int) -> bool:
    """Whether this call of a module is not part of the forward pass on `thread`."""
    return this_thread() != thread or current_backward() != NO_BACKWARD


# A call in another thread may find the hook, and then its mark (that it takes keywords) taken off:
# there `kwargs` is missing.
def _before(
    thread: int, subscriber: Subscriber, watch: Watch, _: nn.Module, args: Any, kwargs: Any = None
) -> Any:
    if is_elsewhere(thread):
        return None
    inputs = (args, kwargs)
    changed = subscriber.before(watch, inputs)
    return None if changed is inputs else changed


def _after(
    thread: int, subscriber: Subscriber, watch: Watch, _: nn.Module, args: Any, output: Any
) -> Any:
    if is_elsewhere(thread):
        return None
    changed = subscriber.after(watch, output)
    return None if changed is output else changed


def _edited_output(
    thread: int, change: Callable[[Any], Any], _: nn.Module, args: Any, output: Any
) -> Any:
    return None if is_elsewhere(thread) else change(output)


def _edited_inputs(
    thread: int, change: Callable[[Any], Any], _: nn.Module, args: Any, kwargs: Any = None
) -> Any:
    return None if is_elsewhere(thread) else change((args, kwargs))


def _here(thread: int, body: Body, forward: Callable[..., Any]) -> Callable[..., Any] | None:
    return None if is_elsewhere(thread) else body(forward)


def _instead(thread: int, subscriber: Subscriber, watch: Watch) -> Skip | None:
    return None if is_elsewhere(thread) else subscriber.instead(watch)
