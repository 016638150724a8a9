"""End a run in front of a layer: nothing behind is computed."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from tracekit.architectures import Named
from tracekit.core.site import Slot
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, InputError
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.interleave.protocol import Unwind
from tracekit.tracing.named import tensor_of
from tracekit.tracing.wanted import Spot, keys_of, wanted

_BEHIND_ALL = (
    "resid_final",
    "final_norm_scale",
    "final_norm_normalized",
    "final_norm_out",
    "logits",
)


@final
class StopAt:
    """The end of a run in front of layer `number`; behind the last, if it is their count."""

    def __init__(self, tree: Tree, layer: int) -> None:
        count = count_layers(tree, "stop_at_layer=")
        if not -count <= layer <= count:
            raise InputError(
                f"stop_at_layer={layer}: there are {count} layers; {count} is behind the last."
            )
        self.number = layer % count if layer < 0 else layer
        name = ("resid_pre", self.number) if self.number < count else ("resid_post", count - 1)
        (spot,) = wanted(tree, name)
        self._site = spot.site
        self._named: Named = spot.named
        self._count = 0
        self._thread = 0
        self.residual: Tensor | None = None

    def place(self, hooks: Hooks) -> None:
        """Put it on for a run, behind what records."""
        self._thread = hooks.thread
        module = hooks.module_at(self._site.path)
        hooks.observe([module], self._site.slot, self._see)

    def _see(self, module: nn.Module, args: Any, value: Any = None) -> None:
        if is_elsewhere(self._thread):
            return
        count, self._count = self._count, self._count + 1
        if self._named.call is not None and count != self._named.call:
            return
        whole = (args, value or {}) if self._site.slot is Slot.INPUT else value
        self.residual = self._named.bound.view(tensor_of(self._named.bound, whole))
        raise Unwind

    def check(self, spots: list[Spot]) -> None:
        """CacheError for what is asked for by its name, and lies behind."""
        for spot in spots:
            key = spot.named.key
            is_behind = key.stack == "layers" and (key.layer or 0) >= self.number
            is_here = key.name == "resid_pre" and key.layer == self.number
            if spot.is_named and not is_here and (is_behind or key.name in _BEHIND_ALL):
                raise CacheError(
                    f"{spot.spelled} is behind stop_at_layer={self.number}: it is not computed."
                )


def count_layers(tree: Tree, what: str) -> int:
    """How many layers the main stack has; InputError if there is none."""
    keys = keys_of(tree)
    found = None if keys is None else keys.spelling.lengths.get("layers")
    if found is None:
        raise InputError(
            f"{what} counts the layers of a model, and it is not known which modules those of "
            f"{type(tree.root).__name__} are."
        )
    return found
