"""Run patches as rows of a batch: from a layer and a position on, from a layer on, or whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.batches import repeated
from tracekit.analysis.patching.batches import Change, Costs, batches, bytes_of_row
from tracekit.analysis.patching.pairs import Pair
from tracekit.analysis.patching.patches import Target, Where
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.models.resuming import Kept, keep, resume
from tracekit.models.signatures import accepts

# What a value at one position has no part in at another position of its layer, in a decoder.
LOCAL: Final = frozenset(
    {
        *("q", "attn_q", "scores", "pattern", "z", "attn_gate", "z_gated", "head_result"),
        *("attn_out", "resid_mid", "mlp_in", "norm2_scale", "norm2_normalized"),
        *("mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_gate", "router_logits", "router_weights"),
        *("experts_out", "shared_expert_out", "mlp_out", "resid_post"),
    }
)


class Way(Enum):
    """How much of a forward is computed for a patch."""

    CONE = "the layers and positions that a patch can change"
    LAYERS = "the layers that a patch can change, at all positions"
    WHOLE = "whole forwards"


@final
@dataclass
class Counts:
    """What was computed: tokens gone through by a layer."""

    computed: int = 0  # by patched runs,
    prepared: int = 0  # by those that they rest on
    begun: int = 0  # patches that were run from a layer on,
    whole: int = 0  # and in whole forwards


@final
class Runs:
    """The patched runs of one pair of prompts."""

    def __init__(
        self,
        model: LanguageModel,
        pair: Pair,
        wheres: dict[str, Where],
        way: Way,
        memory: int,
        counts: Counts,
    ) -> None:
        self._model, self._pair, self._wheres = model, pair, wheres
        self._counts, self._memory = counts, memory
        self._closed: dict[int, str] = {}  # why no run begins at a layer
        self._kept: Kept | None = None
        self.way, self.why = way, ""  # why it is not the least that could be
        self.layers = layers_of(model)
        counts.prepared += 2 * pair.length * self.layers
        if way is not Way.WHOLE:
            self._keep()

    def _keep(self) -> None:
        """Keep the base run; where that can't be, take another way and say why."""
        self.why = _why_whole(self._model, self._pair)
        if self.why:
            self.way = Way.WHOLE
            return
        self._kept = keep(self._model, self._pair.base.ids)
        self._counts.prepared += 2 * self._pair.length * self.layers
        if self._kept.prefix is None and self.way is Way.CONE:
            self.way, self.why = Way.LAYERS, self._kept.why_whole

    # -- what is to be run ----------------------------------------------------------------------

    def change(self, cell: int, targets: tuple[Target, ...]) -> Change | None:
        """What a patch changes; None if it changes nothing of the last logits."""
        some = [(target, self._positions(target)) for target in targets]
        changing = [(target, at) for target, at in some if at]
        if not changing:
            return None
        entries = [self._entry(target) for target, _ in changing]
        entry = None if None in entries else min(each for each in entries if each is not None)
        if entry is not None and not self._is_open(entry):
            entry = None
        elif entry is None and self._kept is not None:
            self.why = self.why or "what is in no layer is run in whole forwards"
        start = min(at[0] for _, at in changing)
        is_cut = entry is not None and self.way is Way.CONE
        return Change(cell, tuple(target for target, _ in changing), entry, start if is_cut else 0)

    def batches(self, changes: Sequence[Change]) -> list[list[Change]]:
        """What runs as one."""
        return batches(changes, self._costs)

    @cached_property
    def _costs(self) -> Costs:
        module = self._model.module
        first = next(module.parameters())
        has_cut = self.way is Way.CONE
        return Costs(
            self._pair.length,
            self.layers,
            _weights_of_a_layer(module, self.layers),
            self._memory,
            bytes_of_row(
                module.config, first.element_size(), self._pair.length, self.layers, has_cut
            ),
            str(self._model.device) != "cpu",
        )

    def _positions(self, target: Target) -> list[int]:
        """Where a target changes what the last logits can be changed by."""
        changed, where = self._pair.changed(target), self._wheres[target.key]
        if self.way is Way.CONE and where.layer == self.layers - 1 and where.name in LOCAL:
            return [at for at in changed if at == self._pair.length - 1]
        return changed

    def _entry(self, target: Target) -> int | None:
        where = self._wheres[target.key]
        if self._kept is None or where.layer is None:
            return None
        return where.layer if where.boundary is None else where.boundary

    def _is_open(self, entry: int) -> bool:
        """Whether runs can begin at a layer; asked once, of one position."""
        if entry not in self._closed:
            kept = self._kept
            assert kept is not None
            at = kept.length - 1 if self.way is Way.CONE else 0
            try:
                resume(self._model, kept, kept.stream[entry][:, at : at + 1], entry, at)
                self._closed[entry] = ""
            except UnsupportedError as error:
                self._closed[entry] = str(error.args[0]).partition(". Run it on tokens")[0]
                self.why = self.why or self._closed[entry]
        return not self._closed[entry]

    # -- running --------------------------------------------------------------------------------

    def logits(self, rows: Sequence[Change]) -> Tensor:
        """The logits at the last position for each change of a batch, `[rows, vocabulary]`."""
        entry, start = rows[0].entry, rows[0].start
        tokens = len(rows) * (self._pair.length - start)
        self._counts.computed += tokens * (self.layers - (entry or 0))
        if entry is None:
            self._counts.whole += len(rows)
            return self._whole(rows)
        self._counts.begun += len(rows)
        assert self._kept is not None
        is_narrowed = self._costs.gains_by_narrowing(tokens)
        residual = self._kept.stream[entry][:, start:].repeat(len(rows), 1, 1)
        for row, change in zip(residual, rows, strict=True):
            for target in change.targets:
                if self._wheres[target.key].boundary == entry:
                    write(row, self._pair.values[target.key], target, start)
        hooks = self._hooks(rows, start, entry)
        return resume(self._model, self._kept, residual, entry, start, hooks, is_narrowed)

    def _whole(self, rows: Sequence[Change]) -> Tensor:
        inputs = repeated(self._pair.base, len(rows)).inputs
        if self._pair.base.is_tokens_alone and accepts(self._model.module, "logits_to_keep"):
            inputs["logits_to_keep"] = 1
        hooks = self._hooks(rows, 0, None)
        return self._model.run_with_hooks(**inputs, fwd_hooks=hooks)[:, -1]

    def _hooks(
        self, rows: Sequence[Change], start: int, entry: int | None
    ) -> list[tuple[str, Callable[..., None]]]:
        """The functions that write into a run, each at one activation."""
        at: dict[str, list[tuple[int, Target]]] = {}
        for row, change in enumerate(rows):
            for target in change.targets:
                if entry is None or self._wheres[target.key].boundary != entry:
                    at.setdefault(target.key, []).append((row, target))
        return [(key, self._writer(key, some, len(rows), start)) for key, some in at.items()]

    def _writer(
        self, key: str, some: list[tuple[int, Target]], rows: int, start: int
    ) -> Callable[..., None]:
        where, values = self._wheres[key], self._pair.values[key]
        first = 0 if where.has_every_key else start

        def written(value: Tensor, hook: object) -> None:
            laid_out = where.laid_out(value, rows)
            for row, target in some:
                write(laid_out[row], values, target, first)

        return written


def write(row: Tensor, values: Tensor, target: Target, start: int) -> None:
    """Write values into one row `[positions from start, heads, …]`, at a target's places."""
    if target.positions is None:
        positions: Any = torch.arange(start, len(values), device=row.device)
    else:
        chosen = [each for each in target.positions if each >= start]
        positions = torch.tensor(chosen, device=row.device)
    if target.heads is None:
        row[positions - start] = values[positions]
        return
    heads = torch.tensor(target.heads, device=row.device)
    row[positions[:, None] - start, heads] = values[positions[:, None], heads]


def layers_of(model: LanguageModel) -> int:
    """How many layers the main stack has; 0 if that is not known."""
    try:
        return len(model.layers)
    except AttributeError:
        return 0


def _why_whole(model: LanguageModel, pair: Pair) -> str:
    """Why runs can't begin in front of a layer; "" if they may."""
    kind = type(model.module).__name__
    if getattr(model.module.config, "is_encoder_decoder", False):
        return f"{kind} has an encoder, which its decoder reads in every layer"
    if not pair.base.is_tokens_alone:
        return "the prompts are more than tokens"
    if not layers_of(model):
        return f"it is not known which modules of {kind} are its layers"
    return ""


def _weights_of_a_layer(module: torch.nn.Module, layers: int) -> float:
    return sum(each.numel() for each in module.parameters()) / max(layers, 1)
