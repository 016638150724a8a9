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
        self.keep = keep
        self._habits = tree.overwrites.setdefault(kind, {})
        self._originals: list[tuple[Site, Tensor, int]] = []  # of sites recorded for the first time
        self.entries: dict[str, list[Entry]] = {}
        # Every tensor recorded, in order, with its entry and its version then.
        self.seen: list[tuple[Entry, Tensor, int]] = []
        self._sharing: dict[int, list[int]] = {}  # storage -> indices in _seen, as far as _indexed
        self._indexed = 0
        self.handed_out: set[int] = set()  # storages that blocks have seen

    def place(self, hooks: Hooks, run: Clock, inputs: bool, outputs: bool) -> None:
        """Put the hooks on; `run` tells the step."""
        for path in self._paths:
            log = _Log(path, self, hooks.thread, run)
            if inputs:
                hooks.observe_inputs(path, self._safely(Site(path, Slot.INPUT), log.see_inputs))
            if outputs:
                hooks.observe_outputs(path, self._safely(Site(path, Slot.OUTPUT), log.see_output))

    def _safely(self, site: Site, hook: ForwardHook) -> ForwardHook:
        """`hook`, given copies of what will be overwritten, or might be."""
        overwrites = self._habits.get(site)
        if overwrites is False or not self.keep.detach:
            return hook
        originals = self._originals if overwrites is None else None
        return partial(_see_copy, hook, self.keep, site, originals)

    # -- edits in place -------------------------------------------------------------------------

    def copy_what_shares(self, value: Any) -> None:
        """Give every record that shares memory with `value` its own copy, while it is right.

        And those that are still to come: the block may keep the value, and edit it any time.
        """
        if not self.keep.detach:
            return  # a copy would have no gradient; should it be overwritten, that is refused
        for index in range(self._indexed, len(self.seen)):
            key = storage_key(self.seen[index][1])
            if key is not None:
                self._sharing.setdefault(key, []).append(index)
        self._indexed = len(self.seen)
        for tensor in tensors(value):
            key = storage_key(tensor)
            if key is None:
                continue
            self.handed_out.add(key)
            for index in self._sharing.pop(key, ()):
                self._check(*self.seen[index])
                self._copy(index)

    def apart(self, kept: Any) -> Any:
        """`kept`, with copies of what a block has in its hands."""

        def own(leaf: Any) -> Any:
            is_shared = isinstance(leaf, Tensor) and storage_key(leaf) in self.handed_out
            return leaf.clone() if is_shared and self.keep.detach else leaf

        return map_leaves(own, kept) if self.handed_out else kept

    def _copy(self, index: int) -> None:
        entry, tensor, _ = self.seen[index]
        copy = tensor.clone()
        self.seen[index] = (entry, copy, version(copy))

        def own(leaf: Any) -> Any:
            return copy if leaf is tensor else leaf

        entry._output = map_leaves(own, entry._output)  # pyright: ignore[reportPrivateUsage] - it is being made
        entry._inputs = map_leaves(own, entry._inputs)  # pyright: ignore[reportPrivateUsage] - it is being made

    def _check(self, entry: Entry, tensor: Tensor, then: int) -> None:
        if version(tensor) != then:
            for slot in (Slot.INPUT, Slot.OUTPUT):  # it is copied from now on
                self._habits[Site(entry.path, slot)] = True
            raise OverwrittenError(
                f"{entry.path} (step {entry.step}) was overwritten in place after it was "
                f"recorded, which it was not in an earlier run; record copies of everything, "
                f"with tracer.cache(..., clone=True)."
            )

    # -- the end --------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Complete the cache with what was recorded."""
        self.cache._freeze(self.entries, self._tree.aliases, self._paths)  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def check(self, was_whole: bool) -> None:
        """Raise if a record is not what was seen, or if a module that was named did not run.

        `was_whole` says that the run was neither stopped nor made to skip a module: what such a
        run did not overwrite may yet be overwritten by another.
        """
        self._learn(was_whole)
        for entry, tensor, then in self.seen:
            self._check(entry, tensor, then)
        if not was_whole or len(self.entries) == len(self._paths):
            return
        missing = [path for path in self._paths if path not in self.entries]
        named = [path for path in missing if path in self._named]
        if named or len(missing) == len(self._paths):
            raise NeverRanError(
                f"{(named or missing)[0]} was to be recorded, but was not called in this run "
                f"({len(named or missing)} such of {len(self._paths)}); its weights may be used "
                f"without calling it. Name modules that run: tracer.cache() shows them."
            )

    def _learn(self, was_whole: bool) -> None:
        for site, original, then in self._originals:
            if version(original) != then:
                self._habits[site] = True
            elif was_whole:
                self._habits.setdefault(site, False)
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
    __slots__ = ("_begun", "_entries", "_path", "_recorder", "_run", "_thread")

    def __init__(self, path: str, recorder: Recorder, thread: int, run: Clock) -> None:
        self._path = path
        self._recorder = recorder
        self._thread = thread
        self._run = run
        self._entries: list[Entry] | None = None
        self._begun: list[Entry] | None = None  # with inputs, and still without output

    def see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        if is_elsewhere(self._thread):
            return
        recorder = self._recorder
        is_tensor = isinstance(output, Tensor)
        kept = recorder.keep.tensor(output) if is_tensor else recorder.keep(output)
        if recorder.handed_out:
            kept = recorder.apart(kept)
        if self._begun:
            entry = self._begun.pop()
            entry._output = kept  # pyright: ignore[reportPrivateUsage] - it is being made
        else:
            entry = self._new(ABSENT, kept)
        if is_tensor:
            recorder.seen.append((entry, kept, version(kept)))
        else:
            recorder.seen.extend((entry, tensor, version(tensor)) for tensor in tensors(kept))

    def see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook."""
        if is_elsewhere(self._thread):
            return
        recorder = self._recorder
        kept = recorder.apart((recorder.keep(args), recorder.keep(kwargs)))
        entry = self._new(kept, ABSENT)
        self._begun = self._begun or []
        self._begun.append(entry)
        recorder.seen.extend((entry, tensor, version(tensor)) for tensor in tensors(kept))

    def _new(self, inputs: Any, output: Any) -> Entry:
        step, entries = self._run.step, self._entries
        if entries is None:
            entry = Entry(self._path, step, 0, inputs, output)
            self._entries = self._recorder.entries[self._path] = [entry]
            return entry
        last = entries[-1]
        entry = Entry(self._path, step, last.call + 1 if last.step == step else 0, inputs, output)
        entries.append(entry)
        return entry
