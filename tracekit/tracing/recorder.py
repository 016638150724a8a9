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
#
# While the model runs, a hook only appends to a list: the same hook for all modules, and nothing
# made for each of them. Entries are made when the run has ended.

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, final
from weakref import ref

from torch import Tensor, nn

from tracekit.core.keep import Keep
from tracekit.core.nest import map_leaves, tensors
from tracekit.core.site import Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import storage_key, version
from tracekit.errors import NeverRanError, OverwrittenError
from tracekit.interleave.duties import Rows
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.tracing.arrivals import await_gradients
from tracekit.tracing.cache import Cache, Recorded
from tracekit.tracing.changes import Changes
from tracekit.tracing.entries import ABSENT, Entry


class Clock(Protocol):
    """Tells the step of a run (an Interleaver)."""

    step: int


# One slot of one call: the module, the slot, the step, the value as it was kept, and the versions
# of its tensors then. A plain tuple: to make anything else takes a tenth of all that a hook takes.
Record: TypeAlias = tuple[nn.Module, Slot, int, Any, int | tuple[int, ...]]


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
        self._cache = cache
        self._tree = tree
        self._modules = modules
        self._paths = {module: path for path, module in modules.items()}
        self._named = named
        self._keep = keep
        self._habits = tree.overwrites.setdefault(kind, {Slot.INPUT: {}, Slot.OUTPUT: {}})
        self._originals: list[Record] = []  # of sites recorded for the first time
        self._records: list[Record] = []
        self._sharing: dict[int, list[int]] = {}  # storage -> records, as far as _indexed
        self._indexed = 0
        self._handed_out: set[int] = set()  # storages that blocks have seen
        self._awaited: dict[int, Any] = {}  # record -> its gradients, to come
        self._nodes: list[Any] = []  # what those wait at, until the model goes on
        self._found: dict[str, list[Entry]] = {}
        self._begun: dict[str, list[Entry]] = {}  # with inputs, and still without output
        self._listed = 0  # records of which there are entries
        self._read = 0  # of those, the ones that were read meanwhile: in memory of their own
        self._refused: set[int] = set()  # records of which there will be none

    def place(self, hooks: Hooks, run: Clock, inputs: bool, outputs: bool, grads: bool) -> None:
        """Put the hooks on; `run` tells the step."""
        self._thread, self._run = hooks.thread, run
        self._marks = [0] * len(self._timeline.passes)  # those that began before
        self._timeline.subscribe(self._mark)
        if outputs:
            plain, copied = self._by_habit(Slot.OUTPUT)
            hooks.observe(plain, Slot.OUTPUT, self._see_output)
            hooks.observe(copied, Slot.OUTPUT, self._see_output_copied)
        if inputs:
            hooks.observe(list(self._modules.values()), Slot.INPUT, self._see_inputs)
        if grads:
            see = self._see_gradients if outputs else self._see_gradients_alone
            hooks.observe(list(self._modules.values()), Slot.OUTPUT, see)

    def _by_habit(self, slot: Slot) -> tuple[list[nn.Module], list[nn.Module]]:
        """Modules whose values may be kept as they are, and those whose values are copied."""
        habits = self._habits[slot]
        if not self._keep.detach or self._tree.original is not None:
            # a copy would have no gradient; the values of a dry run can't be overwritten
            return list(self._modules.values()), []
        plain = [module for path, module in self._modules.items() if habits.get(path) is False]
        if len(plain) == len(self._modules):
            return plain, []
        return plain, [m for path, m in self._modules.items() if habits.get(path) is not False]

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
            self._add(module, Slot.OUTPUT, self._keep(self._copied(module, Slot.OUTPUT, output)))

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if is_elsewhere(self._thread):
            return
        inputs = self._part(module, Slot.INPUT, (args, kwargs))
        if self._keep.detach:
            inputs = self._copied(module, Slot.INPUT, inputs)
        self._add(module, Slot.INPUT, (self._keep(inputs[0]), self._keep(inputs[1])))

    def _see_gradients(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):  # behind the hook that has recorded the output
            mine = self._part(module, Slot.OUTPUT, output)
            awaited, nodes = await_gradients(mine, self._keep)
            self._awaited[len(self._records) - 1] = awaited
            self._nodes += nodes

    def _see_gradients_alone(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):
            self._add(module, Slot.OUTPUT, ABSENT)
            self._see_gradients(module, args, output)

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

    def _copied(self, module: nn.Module, slot: Slot, value: Any) -> Any:
        """`value`, copied where the model overwrites it, or where that is not known yet."""
        habit = self._habits[slot].get(self._paths[module])
        if habit is False:
            return value

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not self._keep.shares(leaf):
                return leaf
            if habit is None:
                self._originals.append((module, slot, 0, leaf.detach(), version(leaf)))
            return leaf.clone()

        return map_leaves(copied, value)

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
            path = self._paths[module]
            self._habits[slot][path] = True  # it is copied from now on
            raise OverwrittenError(
                f"{path}.{slot.value} (step {step}) was overwritten in place after "
                f"it was recorded, which it was not in an earlier run; record copies of "
                f"everything, with tracer.cache(..., clone=True)."
            )

    # -- the end --------------------------------------------------------------------------------

    def freeze(self, was_whole: bool) -> None:
        """Complete the cache with what was recorded, and let go of all else.

        `was_whole` says that the run was neither stopped nor made to skip a module: what such a
        run did not overwrite may yet be overwritten by another.
        """
        self._learn(was_whole)
        self._list()
        self._awaited.clear()
        self._nodes.clear()
        self._cache._freeze(self._told())  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def list_so_far(self) -> None:
        """Put what was recorded until now into the cache, in memory of its own.

        Whoever reads it may keep it, or change it, and the model goes on with what it had. For a
        recorder without gradients, between two calls of modules. What was overwritten is left out,
        and raises OverwrittenError once.
        """
        self._refuse_overwritten()
        for index in range(self._read, len(self._records)):
            self._records[index] = self._with_own(self._records[index])
        self._list()
        self._read = self._listed
        self._cache._show(self._told())  # pyright: ignore[reportPrivateUsage] - the recorder fills it

    def _told(self) -> Recorded:
        changes = self._changes if self._rows is None else self._changes.narrowed(self._rows.span)
        return Recorded(self._found, self._tree.aliases, list(self._modules), changes)

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
        habit = self._habits[slot].get(self._paths[module])
        if self._keep.clone or (self._keep.detach and habit is not False):
            return record  # it was copied when it was recorded
        return module, slot, step, map_leaves(_cloned, value), versions

    def _list(self) -> None:
        """Make entries of the records."""
        found, begun = self._found, self._begun
        passes = iter([*zip(self._marks, self._timeline.passes, strict=True), (-1, None)])
        following, during = next(passes), None
        for index in range(self._listed, len(self._records)):
            if index in self._refused:
                continue
            module, slot, step, value, _ = self._records[index]
            while index >= following[0] >= 0:
                during, following = following[1], next(passes)
            path = self._paths[module]
            awaited = self._awaited.get(index, ABSENT)
            if slot is Slot.OUTPUT and begun.get(path):
                entry = begun[path].pop()
                entry._output, entry._grad = value, awaited  # pyright: ignore[reportPrivateUsage] - it is being made
                continue
            entries = found.setdefault(path, [])
            is_again = bool(entries) and entries[-1].step == step
            call = entries[-1].call + 1 if is_again else 0
            if slot is Slot.OUTPUT:
                entries.append(Entry(path, step, call, ABSENT, value, awaited, during))
            else:
                entries.append(Entry(path, step, call, value, ABSENT, ABSENT, during))
                begun.setdefault(path, []).append(entries[-1])
        self._listed = len(self._records)

    def check(self, was_whole: bool) -> None:
        """Raise if a record is not what was seen, or if a module that was named did not run."""
        for index in range(self._read, len(self._records)):
            _, _, _, value, then = self._records[index]
            if isinstance(then, int) and then >= 0 and value._version == then:
                continue
            if index not in self._refused:
                self._check(self._records[index])
        if not was_whole or len(self._cache) == len(self._modules):
            return
        missing = [path for path in self._modules if path not in self._cache]
        named = [path for path in missing if path in self._named]
        if named or len(missing) == len(self._modules):
            raise NeverRanError(
                f"{(named or missing)[0]} was to be recorded, but was not called in this run "
                f"({len(named or missing)} such of {len(self._modules)}); its weights may be used "
                f"without calling it. Name modules that run: tracer.cache() shows them."
            )

    def _learn(self, was_whole: bool) -> None:
        for module, slot, _, original, then in self._originals:
            path = self._paths[module]
            if version(original) != then:
                self._habits[slot][path] = True
            elif was_whole:
                self._habits[slot].setdefault(path, False)
        self._originals.clear()


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
