"""Fill a Cache from hooks alone, so that no worker waits on it."""

# Guarantees:
#   - what is recorded is what the model went on with, after every edit;
#   - a tensor that something overwrites later is never handed back as if it were the value:
#     before a block gets to edit memory that a record shares, the record is copied; what the
#     model overwrites is copied when it is recorded.
#
# Which values a model overwrites is not to be seen from outside, and copying all of them would cost
# more than the recording. So a site is copied the first time it is recorded, and the original is
# watched; from then on only those are copied that turned out to be overwritten. Should a model
# change its habits, the version counters show it at the end, and the run is refused.

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, final

from torch import Tensor, nn

from tracekit.core.keep import Keep
from tracekit.core.nest import map_leaves, tensors
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.core.versions import storage_key, version
from tracekit.errors import NeverRanError, OverwrittenError
from tracekit.interleave.hooks import ForwardHook, Hooks, is_elsewhere
from tracekit.tracing.cache import Cache
from tracekit.tracing.entries import ABSENT, Entry


class Clock(Protocol):
    """Tells the step of a run (an Interleaver)."""

    step: int


@final
class Recorder:
    """Records the modules at `paths` during one run; `named` are those that must run."""

    def __init__(
        self,
        cache: Cache,
        tree: Tree,
        paths: list[str],
        named: set[str],
        keep: Keep,
        kind: object,
    ) -> None:
        self.cache = cache
        self._tree = tree
        self._paths = paths
        self._named = named
        self._keep = keep
        self._habits = tree.overwrites.setdefault(kind, {})
        self._originals: list[tuple[Site, Tensor, int]] = []  # of sites recorded for the first time
        self._entries: dict[str, list[Entry]] = {}
        # Every tensor recorded, in order, with its entry and its version then.
        self._seen: list[tuple[Entry, Tensor, int]] = []
        self._sharing: dict[int, list[int]] = {}  # storage -> indices in _seen, as far as _indexed
        self._indexed = 0

    def place(self, hooks: Hooks, run: Clock, inputs: bool, outputs: bool) -> None:
        """Put the hooks on; `run` tells the step."""
        for path in self._paths:
            log = _Log(path, self._keep, hooks.thread, run, self._entries, self._seen)
            if inputs:
                hooks.observe_inputs(path, self._safely(Site(path, Slot.INPUT), log.see_inputs))
            if outputs:
                hooks.observe_outputs(path, self._safely(Site(path, Slot.OUTPUT), log.see_output))

    def _safely(self, site: Site, hook: ForwardHook) -> ForwardHook:
        """`hook`, given copies of what will be overwritten, or might be."""
        overwrites = self._habits.get(site)
        if overwrites is False or not self._keep.detach:
            return hook
        originals = self._originals if overwrites is None else None
        return partial(_see_copy, hook, self._keep, site, originals)

    # -- edits in place -------------------------------------------------------------------------

    def copy_what_shares(self, value: Any) -> None:
        """Give every record that shares memory with `value` its own copy, while it is right."""
        for index in range(self._indexed, len(self._seen)):
            key = storage_key(self._seen[index][1])
            if key is not None:
                self._sharing.setdefault(key, []).append(index)
        self._indexed = len(self._seen)
        for tensor in tensors(value):
            for index in self._sharing.pop(storage_key(tensor) or -1, ()):
                self._check(*self._seen[index])
                self._copy(index)

    def _copy(self, index: int) -> None:
        entry, tensor, _ = self._seen[index]
        copy = tensor.clone()
        self._seen[index] = (entry, copy, version(copy))

        def own(leaf: Any) -> Any:
            return copy if leaf is tensor else leaf

        entry._output = map_leaves(own, entry._output)  # pyright: ignore[reportPrivateUsage] - it is being made
        entry._inputs = map_leaves(own, entry._inputs)  # pyright: ignore[reportPrivateUsage] - it is being made

    @staticmethod
    def _check(entry: Entry, tensor: Tensor, then: int) -> None:
        if version(tensor) != then:
            raise OverwrittenError(
                f"{entry.path} (step {entry.step}) was overwritten in place after it was "
                f"recorded, which it was not in an earlier run; record copies of everything, "
                f"with tracer.cache(..., clone=True)."
            )

    # -- the end --------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Complete the cache with what was recorded."""
        self.cache._freeze(self._entries, self._tree.aliases, self._paths)  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def check(self, was_stopped: bool) -> None:
        """Raise if a record is not what was seen, or if a module that was named did not run."""
        self._learn()
        for entry, tensor, then in self._seen:
            if tensor._version != then and then >= 0:
                self._check(entry, tensor, then)
        if was_stopped or len(self._entries) == len(self._paths):
            return
        missing = [path for path in self._paths if path not in self._entries]
        named = [path for path in missing if path in self._named]
        if named or len(missing) == len(self._paths):
            raise NeverRanError(
                f"{(named or missing)[0]} was to be recorded, but was not called in this run "
                f"(nor were {len(named or missing) - 1} more); its weights may be used without "
                f"calling it. Name modules that run: tracer.cache() shows them."
            )

    def _learn(self) -> None:
        for site, original, then in self._originals:
            overwritten = self._habits.get(site, False) or version(original) != then
            self._habits[site] = overwritten
        self._originals.clear()


def _see_copy(
    hook: ForwardHook,
    keep: Keep,
    site: Site,
    originals: list[tuple[Site, Tensor, int]] | None,
    module: nn.Module,
    args: Any,
    value: Any,
) -> None:
    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not keep.shares(leaf):
            return leaf
        if originals is not None:
            originals.append((site, leaf.detach(), version(leaf)))
        return leaf.clone()

    if site.slot is Slot.INPUT:
        args = map_leaves(copied, args)
    hook(module, args, map_leaves(copied, value))


@final
class _Log:
    """What is recorded of one module."""

    # One small object for each module, and no closures: what is made here for every module of a
    # model is what wakes the garbage collector, which costs more than the recording.
    __slots__ = ("_begun", "_cache", "_entries", "_keep", "_path", "_run", "_seen", "_thread")

    def __init__(
        self,
        path: str,
        keep: Keep,
        thread: int,
        run: Clock,
        cache: dict[str, list[Entry]],
        seen: list[tuple[Entry, Tensor, int]],
    ) -> None:
        self._path = path
        self._keep = keep
        self._thread = thread
        self._run = run
        self._cache = cache
        self._seen = seen
        self._entries: list[Entry] | None = None
        self._begun: list[Entry] | None = None  # with inputs, and still without output

    def see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        if is_elsewhere(self._thread):
            return
        is_tensor = isinstance(output, Tensor)
        kept = self._keep.tensor(output) if is_tensor else self._keep(output)
        if self._begun:
            entry = self._begun.pop()
            entry._output = kept  # pyright: ignore[reportPrivateUsage] - it is being made
        else:
            entry = self._new(ABSENT, kept)
        if is_tensor:
            self._seen.append((entry, kept, version(kept)))
        else:
            self._seen.extend((entry, tensor, version(tensor)) for tensor in tensors(kept))

    def see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook."""
        if is_elsewhere(self._thread):
            return
        kept = (self._keep(args), self._keep(kwargs))
        entry = self._new(kept, ABSENT)
        self._begun = self._begun or []
        self._begun.append(entry)
        self._seen.extend((entry, tensor, version(tensor)) for tensor in tensors(kept))

    def _new(self, inputs: Any, output: Any) -> Entry:
        step, entries = self._run.step, self._entries
        if entries is None:
            entry = Entry(self._path, step, 0, inputs, output)
            self._entries = self._cache[self._path] = [entry]
            return entry
        last = entries[-1]
        entry = Entry(self._path, step, last.call + 1 if last.step == step else 0, inputs, output)
        entries.append(entry)
        return entry
