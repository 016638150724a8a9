"""Patch every place of a model, one by one, and compute only what each patch can change."""

# Activation patching: Vig et al. 2020, Meng et al. 2022 ("causal tracing"); the directions as in
# Heimersheim and Nanda 2024. In a decoder a change at layer l and position p leaves all layers
# before l, and all positions before p, as they were.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Measure, measured, name_of
from tracekit.analysis.patching.batches import Change
from tracekit.analysis.patching.check import Recompute, drawn, is_off
from tracekit.analysis.patching.pairs import Pair, Prompt, prompts_of
from tracekit.analysis.patching.patched import PatchSweep, Request, empty
from tracekit.analysis.patching.patches import Asked, Patch, Places
from tracekit.analysis.patching.runs import Counts, Runs, Way, layers_of
from tracekit.analysis.prompts import joined, words_of
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.models.resuming import is_edited

MEMORY = 2**29  # bytes, of the rows of one batch
SHORT = 1.0  # seconds; a sweep that is done by then needs no progress bar


@showing_own_lines
def patch_sweep(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Measure,
    over: Sequence[str] = ("layer", "position"),
    *,
    activation: str = "resid_pre",
    layers: Places = None,
    positions: Places | Literal["all"] = None,
    heads: Places = None,
    patches: Iterable[Patch] | None = None,
    direction: Literal["denoise", "noise"] = "denoise",
    memory: int = MEMORY,
    check: int = 8,
    seed: int | None = None,
    progress: bool = True,
    resume: PatchSweep | None = None,
) -> PatchSweep:
    """What a metric becomes when values of one run are written into another, place by place.

    `clean` and `corrupted` are texts, tokens, or lists of them for several pairs, of one length.
    Values of the clean run go into the corrupted one ("denoise"), or the other way round ("noise").
    `metric` is a function of the logits at the last token, `[prompts, vocabulary]`.

    `over` names the axes, of "layer", "position" and "head"; what is no axis is patched together.
    `activation` is any standard name that has positions. A list of paths of modules instead patches
    what these return, at each position. `layers`, `positions` and `heads` choose; an item of them
    that is itself a list is patched together, as in `layers=[[0, 1], [2, 3]]`. Or `patches` says
    each one: `[Patch("z", layer=3, head=(1, 2)), …]`.

    Only what a patch can change is computed: layers from its own on, positions from its own on,
    behind the keys and values of those before; patches near each other share a batch, of at most
    `memory` bytes (about). What writes the bits that are there is not run at all. Where a model
    can't be cut so, more is computed; `.how` says what. `check` patches, drawn at random (`seed`),
    are computed again in whole forwards with plain hooks: if logits differ by more than rounding,
    all is computed another way, or UnsupportedError says so. Ctrl-C hands back what is done.
    """
    _check(model, direction)
    asked = Asked(model, over, activation, layers, positions, heads, patches)
    pairs = _pairs(model, clean, corrupted, direction)
    sweep = _Sweep(model, asked, pairs, metric, direction, memory, check, seed, progress)
    with torch.no_grad():
        return sweep.run(resume)


def _check(model: LanguageModel, direction: str) -> None:
    if direction not in ("denoise", "noise"):
        raise InputError(
            f"direction= is 'denoise' (clean values into the corrupted run) or 'noise', not "
            f"{direction!r}."
        )
    model.dispatch()
    if is_edited(model):
        raise UnsupportedError(
            "patch_sweep() does not make lasting edits, or hooks: which of them a patch leaves as "
            "they were can't be told. Sweep the model without them."
        )
    if model.module.training:
        raise InputError("the model is in training mode, where dropout is random: model.eval().")


def _pairs(
    model: LanguageModel, clean: Any, corrupted: Any, direction: str
) -> list[tuple[Prompt, Prompt]]:
    """The run that is patched, and the other, of each pair."""
    own, other = prompts_of(model, clean, "clean"), prompts_of(model, corrupted, "corrupted")
    if len(own) != len(other):
        raise InputError(f"{len(own)} clean prompts and {len(other)} corrupted ones are no pairs.")
    if direction == "denoise":
        own, other = other, own
    return list(zip(own, other, strict=True))


class _Deviates(Exception):
    """A patched run is not what a whole forward gives."""


@final
class _Sweep:
    """One sweep, on its way."""

    def __init__(
        self,
        model: LanguageModel,
        asked: Asked,
        pairs: list[tuple[Prompt, Prompt]],
        metric: Measure,
        direction: str,
        memory: int,
        check: int,
        seed: int | None,
        progress: bool,
    ) -> None:
        self._model, self._asked, self._prompts = model, asked, pairs
        self._metric, self._direction, self._memory = metric, direction, memory
        self._check, self._seed, self._progress = check, seed, progress
        self._counts = Counts()
        self._way, self._why = Way.CONE, ""
        self._pair = self._pair_at(0)
        self._cells = asked.cells(self._pair.sizes, self._tokens())
        self._shape = (len(pairs), *(len(axis.labels) for axis in self._cells.axes))
        self._values, self._done = empty((len(pairs), len(self._cells.patches)))
        self._unpatched = torch.full((2, len(pairs)), math.nan)  # the metric of base and other
        self._drawn: set[tuple[int, int]] = set()  # pairs and cells to be held against another way
        self._deviation, self._checked, self._unchanged = 0.0, 0, 0

    def run(self, before: PatchSweep | None) -> PatchSweep:
        """All that is not done yet."""
        if before is not None:
            self._take_up(before)
        while True:
            left = (~self._done).nonzero().tolist()
            self._drawn = {tuple(left[at]) for at in drawn(len(left), self._check, self._seed)}
            try:
                self._run_pairs()
                return self._result()
            except KeyboardInterrupt:
                return self._result()
            except _Deviates as error:
                self._fall_back(str(error))

    def _fall_back(self, why: str) -> None:
        """Begin anew in a way that rests on less; UnsupportedError if there is none left."""
        ways = list(Way)
        left = ways[ways.index(self._way) + 1 :]
        if not left:
            raise UnsupportedError(
                f"patched runs are not what the module itself gives with plain hooks: {why}. Is it "
                f"the same in every run, and each row of a batch as it is alone?"
            )
        self._way, self._why = left[0], f"less was wrong: {why}"
        self._values, self._done = empty(tuple(self._values.shape))
        self._counts.begun = self._counts.whole = 0
        self._deviation, self._checked, self._unchanged = 0.0, 0, 0

    # -- pairs ----------------------------------------------------------------------------------

    def _pair_at(self, number: int) -> Pair:
        base, source = self._prompts[number]
        return Pair(self._model, base, source, self._asked.wheres)

    def _run_pairs(self) -> None:
        with self._bar() as bar:
            for number in range(len(self._prompts)):
                if bool(self._done[number].all()):
                    continue
                pair = self._pair if number == 0 else self._pair_at(number)
                self._check_length(pair)
                self._run_pair(number, pair, bar)

    def _check_length(self, pair: Pair) -> None:
        axes = {axis.name for axis in self._cells.axes}
        if pair.length != self._pair.length and axes & {"position", "patch"}:
            raise InputError(
                f"pairs of {self._pair.length} and of {pair.length} tokens have no positions in "
                f"common: leave 'position' out of over=, or sweep them one by one."
            )

    def _run_pair(self, number: int, pair: Pair, bar: Any) -> None:
        runs = Runs(self._model, pair, self._asked.wheres, self._way, self._memory, self._counts)
        self._way, self._why = runs.way, self._why or runs.why
        recompute = Recompute(self._model, pair, self._asked.wheres)
        left = [cell for cell in range(len(self._cells.patches)) if not self._done[number, cell]]
        changes: list[Change] = []
        for place, logits in enumerate((pair.logits, pair.source_logits)):
            self._unpatched[place, number] = self._measured(number, logits)
        for cell in left:
            change = runs.change(cell, self._cells.patches[cell])
            if change is not None:
                changes.append(change)
                continue
            if (number, cell) in self._drawn:
                self._hold(recompute, pair.logits[0], cell)
            self._put(number, cell, float(self._unpatched[0, number]))
            self._unchanged += 1
            bar.update()
        self._why = self._why or runs.why
        left_over = runs.batches(changes)[::-1]
        while left_over:
            batch = left_over.pop()
            try:
                logits = runs.logits(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                left_over += [batch[half:], batch[:half]]
                continue
            for change, row in zip(batch, logits, strict=True):
                if (number, change.cell) in self._drawn:
                    self._hold(recompute, row, change.cell)
            for change, row in zip(batch, logits, strict=True):
                self._put(number, change.cell, float(self._measured(number, row[None])))
            bar.update(len(batch))

    def _hold(self, recompute: Recompute, logits: Tensor, cell: int) -> None:
        """Hold a patched run against a whole one; _Deviates if it is another."""
        off = recompute.deviation(logits, self._cells.patches[cell])
        if is_off(off, recompute.tolerance):
            raise _Deviates(f"logits were off by {off:.2g} at {self._cells.names[cell]}")
        self._deviation = max(self._deviation, off)
        self._checked += 1

    def _put(self, number: int, cell: int, value: float) -> None:
        self._values[number, cell] = value
        self._done[number, cell] = True

    def _measured(self, number: int, logits: Tensor) -> Tensor:
        """The metric of one prompt, with these logits `[1, vocabulary]`."""
        if len(self._prompts) == 1:
            return measured(self._metric, logits)[0].detach()
        every = logits.expand(len(self._prompts), -1)  # which may have a token for each prompt
        found = self._metric(every)
        if found.shape != (len(every),):
            raise InputError(
                f"a metric of several pairs gives a number for each prompt, [{len(every)}], not "
                f"{list(found.shape)}."
            )
        return found[number].detach()

    # -- what is handed back --------------------------------------------------------------------

    def _result(self) -> PatchSweep:
        pairs = Axis("pair", tuple(map(str, range(len(self._prompts)))))
        values = self._values.reshape(self._shape).clone()
        base, other = self._unpatched.clone()
        clean, corrupted = (other, base) if self._direction == "denoise" else (base, other)
        layers = max(layers_of(self._model), 1)
        naive = sum(base.length for base, _ in self._prompts) * layers * len(self._cells.patches)
        return PatchSweep(
            per_pair=Labelled(values, (pairs, *self._cells.axes), name_of(self._metric)),
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            direction=self._direction,
            what=self._asked.name,
            how=self._how(),
            deviation=self._deviation,
            checked=self._checked,
            layer_tokens=self._counts.computed + self._counts.prepared,
            naive_layer_tokens=naive,
            unchanged=self._unchanged,
            done=self._done.reshape(self._shape).clone(),
            request=self._request(),
        )

    def _how(self) -> str:
        """What was computed, and why it was not less."""
        whole, begun = self._counts.whole, self._counts.begun
        way = Way.WHOLE if whole and not begun else self._way
        why = f" ({self._why})" if self._why else ""
        part = f", {whole} patches in {Way.WHOLE.value}" if whole and begun else ""
        return f"{way.value}{part}{why}"

    def _request(self) -> Request:
        tokens = [tuple(each.ids[0].tolist()) for pair in self._prompts for each in pair]
        return Request(tuple(tokens), self._cells.patches, name_of(self._metric), self._direction)

    def _take_up(self, before: PatchSweep) -> None:
        if before.request != self._request():
            raise InputError(
                "resume= takes a sweep of the same prompts, patches, metric and direction, which "
                "was interrupted; this one is another."
            )
        self._values = before.per_pair.values.reshape(self._values.shape).clone()
        self._done = before.done.reshape(self._done.shape).clone()
        each = (before.corrupted_per_pair, before.clean_per_pair)
        self._unpatched = torch.stack(each if self._direction == "denoise" else each[::-1])
        self._deviation, self._checked = before.deviation, before.checked
        self._counts.computed, self._unchanged = before.layer_tokens, before.unchanged

    def _tokens(self) -> Sequence[str]:
        """The text of each position in the clean prompts, where there is one."""
        if self._model.tokenizer is None:
            return ()
        clean = [pair[self._direction == "denoise"] for pair in self._prompts]
        alike = [each.ids[0] for each in clean if each.length == clean[0].length]
        return joined([words_of(self._model, ids) for ids in alike])

    def _bar(self) -> Any:
        from tqdm.auto import tqdm

        bar: Any = tqdm(
            total=self._done.numel(),
            initial=int(self._done.sum()),
            desc="patch",
            unit="patch",
            delay=SHORT,
            disable=not self._progress,
        )
        return bar
