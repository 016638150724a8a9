"""Fill a Cache from hooks alone, so that no worker waits on it."""

# Guarantees:
#   - what is recorded is what the model went on with, after every edit;
#   - a tensor that something overwrites later is never handed back as if it were the value:
#     before a block gets to edit memory that a record shares, the record is copied; what the
#     model overwrites is copied when it is recorded.
#
# While the model runs, a hook only appends to a list: the same hook for all modules, and nothing
# made for each of them. Entries are made when the run has ended.

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Protocol, final
from weakref import ref

from torch import Tensor, nn

from tracekit.core.keep import Keep
from tracekit.core.nest import first_input, first_tensor, map_leaves, tensors
from tracekit.core.site import Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import storage_key, version
from tracekit.errors import NeverRanError, OverwrittenError
from tracekit.interleave.duties import Rows, Span
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.tracing.arrivals import await_gradients
from tracekit.tracing.cache import Cache, Recorded
from tracekit.tracing.changes import Changes
from tracekit.tracing.entries import ABSENT
from tracekit.tracing.habits import Habits
from tracekit.tracing.listing import Listing, Record
from tracekit.tracing.offload import offload_of
from tracekit.tracing.sites import Sites


class Clock(Protocol):
    """Tells the step of a run (an Interleaver)."""

    step: int


@final
class Recorder:
    """Records `modules` (by path) during one run; `named` are those that must run."""

    def __init__(
        self,
        cache: Cache,
        tree: Tree,
        modules: dict[str, nn.Module],
        named: set[str],
        keep: Keep,
        kind: object,
        changes: Changes,
        rows: Rows | None = None,
    ) -> None:
        cache._filling = ref(self)  # pyright: ignore[reportPrivateUsage] - the recorder fills it
        self._changes = changes
        self._timeline = changes.timeline
        self._marks: list[int] = []  # how many records there were when each forward began
        self._rows = rows  # of the block that records; None: all
        self.cache = cache
        self._tree = tree
        self._modules = modules
        self._sites: Sites | None = None  # whose values are recorded each by itself, if they are
        self._structures: set[nn.Module] = set()  # of whose outputs all tensors are kept
        self._paths = {module: path for path, module in modules.items()}
        self._named = named
        self._records: list[Record] = []
        self._offload = offload_of(keep, self._records)
        self._keep_gradients = keep  # each at once: they come on other threads
        self._keep = keep if self._offload is None else replace(keep, outbox=self._offload)
        known = tree.overwrites.setdefault(kind, {Slot.INPUT: {}, Slot.OUTPUT: {}})
        self._habits = Habits(known, self._paths, self._keep, tree.planner)
        self._sharing: dict[int, list[int]] = {}  # storage -> records, as far as _indexed
        self._indexed = 0
        self._handed_out: set[int] = set()  # storages that blocks have seen
        self._awaited: dict[int, Any] = {}  # record -> its gradients, to come
        self._nodes: list[Any] = []  # what those wait at, until the model goes on
        self._listing = Listing(self._paths)
        self._read = 0  # records that were read meanwhile: in memory of their own
        self._refused: set[int] = set()  # records of which there will be none

    @property
    def span(self) -> Span | None:
        """Of the rows that are recorded; None: all."""
        return None if self._rows is None else self._rows.span

    def _begin(self, hooks: Hooks, run: Clock) -> None:
        self._thread, self._run = hooks.thread, run
        self._marks = [0] * len(self._timeline.passes)  # those that began before
        self._timeline.subscribe(self._mark)

    def place_at(self, hooks: Hooks, run: Clock, sites: Sites, grads: bool) -> None:
        """Put hooks on that keep each of these values by itself."""
        self._begin(hooks, run)
        self._sites, self._listing.is_apart = sites, True
        self._structures = {self._modules[site.path] for site in sites.whole}
        quick = {Slot.OUTPUT: self._see_first_of_output, Slot.INPUT: self._see_first_of_input}
        for slot, see in quick.items():
            modules = sites.modules[slot]
            is_quick = not (grads or sites.cuts or self._rows)
            plain, rest = (
                self._by_habit(slot, modules) if is_quick else ([], list(modules.values()))
            )
            hooks.observe(plain, slot, see)
            hooks.observe(rest, slot, partial(self._see_site, slot, grads))

    def place(self, hooks: Hooks, run: Clock, inputs: bool, outputs: bool, grads: bool) -> None:
        """Put the hooks on; `run` tells the step."""
        self._begin(hooks, run)
        if outputs:
            plain, copied = self._by_habit(Slot.OUTPUT, self._modules)
            hooks.observe(plain, Slot.OUTPUT, self._see_output)
            hooks.observe(copied, Slot.OUTPUT, self._see_output_copied)
        if inputs:
            hooks.observe(list(self._modules.values()), Slot.INPUT, self._see_inputs)
        if grads:
            see = self._see_gradients if outputs else self._see_gradients_alone
            hooks.observe(list(self._modules.values()), Slot.OUTPUT, see)

    def _by_habit(
        self, slot: Slot, modules: dict[str, nn.Module]
    ) -> tuple[list[nn.Module], list[nn.Module]]:
        """Modules whose values may be kept as they are, and those whose values are copied."""
        is_dry = self._tree.original is not None and not self._tree.gone
        is_dry = is_dry and self._tree.planner is None  # that does all that a real run does
        if not self._keep.detach or is_dry:
            # a copy would have no gradient; the values of a dry run can't be overwritten
            return list(modules.values()), []
        return self._habits.divide(slot, modules)

    def _mark(self) -> None:
        self._marks.append(len(self._records))

    # -- the hooks ------------------------------------------------------------------------------

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_elsewhere(self._thread):
            return
        if type(output) is Tensor and not self._handed_out and self._rows is None:
            kept = self._keep.tensor(output)
            self._records.append((module, Slot.OUTPUT, self._run.step, kept, version(kept)))
        else:
            self._add(module, Slot.OUTPUT, self._keep(self._part(module, Slot.OUTPUT, output)))

    def _see_output_copied(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):
            output = self._part(module, Slot.OUTPUT, output)
            self._add(
                module, Slot.OUTPUT, self._keep(self._habits.copied(module, Slot.OUTPUT, output))
            )

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if is_elsewhere(self._thread):
            return
        inputs = self._part(module, Slot.INPUT, (args, kwargs))
        if self._keep.detach:
            inputs = self._habits.copied(module, Slot.INPUT, inputs)
        self._add(module, Slot.INPUT, (self._keep(inputs[0]), self._keep(inputs[1])))

    def _see_gradients(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):  # behind the hook that has recorded the output
            mine = self._part(module, Slot.OUTPUT, output)
            awaited, nodes = await_gradients(mine, self._keep_gradients)
            self._awaited[len(self._records) - 1] = awaited
            self._nodes += nodes

    def _see_gradients_alone(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):
            self._add(module, Slot.OUTPUT, ABSENT)
            self._see_gradients(module, args, output)

    # Of values by themselves: one tensor of each, mostly.

    def _see_first_of_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if is_elsewhere(self._thread):
            return
        tensor = output if type(output) is Tensor else first_tensor(output)
        if tensor is None or self._handed_out or module in self._structures:
            self._see_site(Slot.OUTPUT, False, module, args, output)
        else:
            kept = self._keep.tensor(tensor)
            self._records.append((module, Slot.OUTPUT, self._run.step, kept, version(kept)))

    def _see_first_of_input(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if is_elsewhere(self._thread):
            return
        tensor = args[0] if args else first_input((args, kwargs or {}))
        if type(tensor) is not Tensor or self._handed_out:
            self._see_site(Slot.INPUT, False, module, args, kwargs)
        else:
            kept = self._keep.tensor(tensor)
            self._records.append((module, Slot.INPUT, self._run.step, kept, version(kept)))

    def _see_site(
        self, slot: Slot, has_grads: bool, module: nn.Module, args: Any, value: Any = None
    ) -> None:
        if is_elsewhere(self._thread):
            return
        assert self._sites is not None
        whole = self._part(module, slot, (args, value or {}) if slot is Slot.INPUT else value)
        found = self._sites.of_interest(Site(self._paths[module], slot), whole)
        if found is None:
            return
        kept = self._sites.cut(Site(self._paths[module], slot), found)
        if kept is found and self._keep.detach:
            kept = self._habits.copied(module, slot, kept)
        self._add(module, slot, self._keep(kept))
        if has_grads:
            awaited, nodes = await_gradients(found, self._keep_gradients)
            self._awaited[len(self._records) - 1] = awaited
            self._nodes += nodes

    def _part(self, module: nn.Module, slot: Slot, value: Any) -> Any:
        if self._rows is None:
            return value
        site = Site(self._paths[module], slot)
        return self._rows.narrow(Visit(site, self._run.step), value).value

    def _add(self, module: nn.Module, slot: Slot, kept: Any) -> None:
        if self._handed_out and self._keep.detach:
            kept = map_leaves(self._apart, kept)
        versions = tuple(map(version, tensors(kept)))
        self._records.append((module, slot, self._run.step, kept, versions))

    def _apart(self, leaf: Any) -> Any:
        is_shared = isinstance(leaf, Tensor) and storage_key(leaf) in self._handed_out
        return leaf.clone() if is_shared else leaf

    # -- edits in place -------------------------------------------------------------------------

    def copy_what_shares(self, value: Any) -> None:
        """Give every record that shares memory with `value` its own copy, while it is right.

        And those that are still to come: the block may keep the value, and edit it any time.
        """
        if not self._keep.detach:
            return  # a copy would have no gradient; should it be overwritten, that is refused
        for index in range(max(self._indexed, self._read), len(self._records)):
            for tensor in tensors(self._records[index][3]):
                key = storage_key(tensor)
                if key is not None:
                    self._sharing.setdefault(key, []).append(index)
        self._indexed = len(self._records)
        for tensor in tensors(value):
            key = storage_key(tensor)
            if key is not None:
                self._handed_out.add(key)
                for index in self._sharing.pop(key, ()):
                    if index < self._read or index in self._refused:
                        continue
                    self._check(self._records[index])
                    self._records[index] = self._with_own_memory(self._records[index])

    def _with_own_memory(self, record: Record) -> Record:
        module, slot, step, value, _ = record
        value = map_leaves(self._apart, value)
        return module, slot, step, value, tuple(map(version, tensors(value)))

    def _check(self, record: Record) -> None:
        module, slot, step, value, then = record
        now = version(value) if isinstance(then, int) else tuple(map(version, tensors(value)))
        if now != then:
            self._habits.note_overwritten(module, slot)
            raise OverwrittenError(
                f"{self._paths[module]}.{slot.value} (step {step}) was overwritten in place after "
                f"it was recorded, which it was not in an earlier run; record copies of "
                f"everything, with tracer.cache(..., clone=True)."
            )

    # -- the end --------------------------------------------------------------------------------

    def freeze(self, was_whole: bool) -> None:
        """Complete the cache with what was recorded, and let go of all else.

        `was_whole` says that the run was neither stopped nor made to skip a module: what such a
        run did not overwrite may yet be overwritten by another.
        """
        self._habits.learn(was_whole)
        if self._offload is not None:
            self._refused |= self._offload.finish()
        self._list()
        self._awaited.clear()
        self._nodes.clear()
        self.cache._freeze(self._told())  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def list_so_far(self) -> None:
        """Put what was recorded until now into the cache, in memory of its own.

        Whoever reads it may keep it, or change it, and the model goes on with what it had. For a
        recorder without gradients, between two calls of modules. What was overwritten is left out,
        and raises OverwrittenError once.
        """
        self._refuse_overwritten()
        if self._offload is not None:
            self._offload.ship()
        for index in range(self._read, len(self._records)):
            self._records[index] = self._with_own(self._records[index])
        if self._offload is not None:
            self._offload.fence()
        self._list()
        self._read = self._listing.count
        self.cache._show(self._told())  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def _asked(self) -> list[str]:
        return list(self._modules) if self._sites is None else self._sites.asked

    def _told(self) -> Recorded:
        changes = self._changes if self._rows is None else self._changes.narrowed(self._rows.span)
        return Recorded(self._listing.found, self._tree.aliases, self._asked(), changes)

    def _refuse_overwritten(self) -> None:
        errors: list[OverwrittenError] = []
        for index in range(self._read, len(self._records)):
            if index in self._refused:
                continue
            try:
                self._check(self._records[index])
            except OverwrittenError as error:
                self._refused.add(index)
                errors.append(error)
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()  # this frame is in its traceback

    def _with_own(self, record: Record) -> Record:
        module, slot, step, value, versions = record
        is_plain = self._habits.of(module, slot) is False
        if self._keep.clone or (self._keep.detach and not is_plain):
            return record  # it was copied when it was recorded
        return module, slot, step, map_leaves(_cloned, value), versions

    def _list(self) -> None:
        """Make entries of the records."""
        passes = self._timeline.passes
        self._listing.add(self._records, self._refused, self._awaited, self._marks, passes)

    def check(self, was_whole: bool) -> None:
        """Raise if a record is not what was seen, or if a module that was named did not run."""
        if self._offload is not None:
            self._offload.check()
        for index in range(self._read, len(self._records)):
            _, _, _, value, then = self._records[index]
            if isinstance(then, int) and then >= 0 and value._version == then:
                continue
            if index not in self._refused:
                self._check(self._records[index])
        asked = self._asked()
        if not was_whole or len(self.cache) == len(asked):
            return
        missing = [path for path in asked if path not in self.cache]
        named = [path for path in missing if path in self._named]
        if named or len(missing) == len(asked):
            raise NeverRanError(
                f"{(named or missing)[0]} was to be recorded, but was not called in this run "
                f"({len(named or missing)} such of {len(asked)}); its weights may be used "
                f"without calling it. Name modules that run: tracer.cache() shows them."
            )


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
