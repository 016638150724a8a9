"""Learn which values a model overwrites, and copy those, before they are recorded."""

# Which values a model overwrites is not to be seen from outside, and copying all of them would cost
# more than the recording. So a site is copied the first time it is recorded, and the original is
# watched; from then on only those are copied that turned out to be overwritten. Should a model
# change its habits, the version counters show it, and the run is refused.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from tracekit.core.keep import Keep
from tracekit.core.nest import map_leaves
from tracekit.core.site import Slot
from tracekit.core.tree import Planner
from tracekit.core.versions import counter, version


@final
class Habits:
    """What is known of the sites of one kind of run: whether they are overwritten."""

    def __init__(
        self,
        known: dict[Slot, dict[str, bool]],
        paths: Mapping[nn.Module, str],
        keep: Keep,
        planner: Planner | None,
    ) -> None:
        self._known = known
        self._paths = paths
        self._keep = keep
        self._planner = planner
        # Of sites recorded for the first time: what has the version of the original, and its then.
        self._originals: list[tuple[nn.Module, Slot, Tensor, int]] = []

    def of(self, module: nn.Module, slot: Slot) -> bool | None:
        """Whether it is overwritten; None if that is not known yet."""
        return self._known[slot].get(self._paths[module])

    def divide(
        self, slot: Slot, modules: dict[str, nn.Module]
    ) -> tuple[list[nn.Module], list[nn.Module]]:
        """Modules whose values may be kept as they are, and those whose values are copied."""
        known = self._known[slot]
        plain = [module for path, module in modules.items() if known.get(path) is False]
        if len(plain) == len(modules):
            return plain, []
        return plain, [m for path, m in modules.items() if known.get(path) is not False]

    def copied(self, module: nn.Module, slot: Slot, value: Any) -> Any:
        """`value`, copied where the model overwrites it, or where that is not known yet."""
        habit = self.of(module, slot)
        if habit is False:
            return value

        def copied(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not self._keep.shares(leaf):
                return leaf
            if habit is None:
                self._originals.append((module, slot, self._watched(leaf), version(leaf)))
                if self._planner is not None:
                    self._planner.copies(leaf)
            return leaf.clone()

        return map_leaves(copied, value)

    def _watched(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._keep.device or self._keep.outbox is None:
            return tensor.detach()
        return counter(tensor)  # the memory of an accelerator is not held until the run ends

    def note_overwritten(self, module: nn.Module, slot: Slot) -> None:
        """It is copied from now on."""
        self._known[slot][self._paths[module]] = True

    def learn(self, was_whole: bool) -> None:
        """See what became of the originals; a run that was not whole may have spared some."""
        for module, slot, original, then in self._originals:
            if version(original) != then:
                self.note_overwritten(module, slot)
            elif was_whole:
                self._known[slot].setdefault(self._paths[module], False)
        self._originals.clear()
