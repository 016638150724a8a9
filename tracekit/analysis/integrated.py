"""Integrated gradients: what each place gives to a metric, along the way from a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from tracekit.analysis.batches import MEMORY, chunks, repeated, rows_that_fit
from tracekit.analysis.gradients import gradients_of, name_at
from tracekit.analysis.labelled import Labelled
from tracekit.analysis.metrics import Measure, measured, name_of
from tracekit.analysis.places import added_up, axes_known, axes_of, check_over, is_of_layers
from tracekit.analysis.prompts import Prompts, last_logits, one_prompt
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel

KEPT: Final = ("position", "head", "key")
# "zero", "pad" and "mean" (of token embeddings), values, or another prompt: its activation.
Baseline: TypeAlias = "str | Tensor | Any"


@final
@dataclass(frozen=True, repr=False)
class Integrated:
    """Integrated gradients: `scores`, [position] and what else there is, and how good they are.

    By completeness their sum is `value - baseline`, what the metric is of the prompt less what it
    is at the baseline, each measured by a run of its own; `error` is by how much it is not.
    """

    scores: Labelled
    value: float
    baseline: float
    steps: int

    @property
    def error(self) -> float:
        """Sum of the scores less `value - baseline`, in units of the metric."""
        return float(self.scores.values.double().sum()) - (self.value - self.baseline)

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        numbers = {name: getattr(self, name) for name in ("value", "baseline", "steps", "error")}
        return {"scores": self.scores.to_json(), **numbers}

    def __repr__(self) -> str:
        change = self.value - self.baseline
        return (
            f"Integrated({self.steps} steps: the metric goes from {self.baseline:.4g} to "
            f"{self.value:.4g}; the scores add up to {change + self.error:.4g}, off by "
            f"{self.error:.2g})\n{self.scores}"
        )


@showing_own_lines
@torch.inference_mode(False)
def integrated_gradients(
    model: LanguageModel,
    input: Any,
    metric: Measure,
    *,
    baseline: Baseline = "zero",
    activation: str = "embed_out",
    layer: int | None = None,
    over: Sequence[str] | None = None,
    steps: int = 32,
    memory: int = MEMORY,
) -> Integrated:
    """What each token of one prompt gives to a metric, along the straight way from a baseline.

    Of token embeddings, or of another activation (of one `layer`, if layers have it). `baseline` is
    "zero"; "pad" or "mean", an embedding for all tokens; a tensor; or a prompt of as many tokens,
    whose activation it is. `steps` points of Gauss and Legendre, as rows of batches for which
    `memory` bytes are enough. Look at `.error`: a way on which a norm is given almost nothing (a
    residual stream from zero) takes many more steps than one of embeddings. Sundararajan et al.
    2017, "Axiomatic Attribution for Deep Networks".
    """
    over = check_over(activation, _kept(activation) if over is None else over)
    if is_of_layers(activation) is (layer is None) or "layer" in over:
        which = "is of layers: name one, layer=" if layer is None else "is not of layers: no layer="
        raise InputError(f"integrated_gradients: {activation} {which}.")
    prompts = one_prompt(model, input, "integrated_gradients")
    way = _Way(model, prompts, name_at(activation, layer), metric, baseline)
    points, weights = nodes(steps)
    total = torch.zeros_like(way.end, dtype=torch.promote_types(way.end.dtype, torch.float32))
    for part in chunks(steps, rows_that_fit(model, prompts, memory)):
        gradients = way.gradients(points[part].to(way.end)).to(total)
        total += torch.einsum("s,s...->...", weights[part].to(gradients), gradients)
    ends = way.metric_at(torch.tensor([1.0, 0.0]).to(way.end))
    product = (total * (way.end - way.begin))[None]
    values = product[None] if is_of_layers(activation) else product
    known = axes_known(model, prompts, over, [], "integrated_gradients")
    what = f"integrated gradients of {name_of(metric)}"
    scores = added_up(values, activation, over, known, what)
    return Integrated(scores, float(ends[0]), float(ends[1]), steps)


@final
class _Way:
    """The straight way from a baseline to the activation of a prompt; without the batch axis."""

    def __init__(
        self, model: LanguageModel, prompts: Prompts, name: Any, metric: Measure, baseline: Baseline
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._name = name
        self._metric = metric
        self.end = self._recorded(prompts)
        self.begin = self._baseline(baseline).to(self.end)

    def gradients(self, points: Tensor) -> Tensor:
        """The metric's gradient at points of the way: `[points, …]`."""
        rows = repeated(self._prompts, len(points))
        there = self._at(points)
        word = self._name if isinstance(self._name, str) else self._name[0]
        found = gradients_of(
            self._model, rows, [self._name], self._metric, hooks=[(self._name, there)]
        )
        return next(iter(found[word].gradients.values())).reshape(len(points), *self.end.shape)

    @torch.no_grad()
    def metric_at(self, points: Tensor) -> Tensor:
        """The metric at points of the way: `[points]`."""
        rows = repeated(self._prompts, len(points))
        hooks = [(self._name, self._at(points))]
        output = self._model.run_with_hooks(**rows.inputs, fwd_hooks=hooks)
        return measured(self._metric, last_logits(rows, output))

    def _at(self, points: Tensor) -> Any:
        along = points.view(-1, *[1] * self.end.dim())
        value = self.begin + along * (self.end - self.begin)
        return lambda tensor, hook: value.reshape(tensor.shape)

    @torch.no_grad()
    def _recorded(self, prompts: Prompts) -> Tensor:
        _, cache = self._model.run_with_cache(**prompts.inputs, names_filter=self._name)
        found = cache[self._name]
        return found[0] if found.shape[0] == 1 else found  # folded: no axis of rows

    def _baseline(self, given: Baseline) -> Tensor:
        if isinstance(given, Tensor):
            return self._fitting(given)
        if isinstance(given, str) and given in ("zero", "pad", "mean"):
            return torch.zeros_like(self.end) if given == "zero" else self._embedding(given)
        other = one_prompt(self._model, given, "a baseline")
        if other.ids.shape != self._prompts.ids.shape:
            raise InputError(
                f"baseline= is a prompt of {other.length} tokens, and the input has "
                f"{self._prompts.length}: give one of as many, or 'zero', 'pad' or 'mean'."
            )
        return self._recorded(other)

    def _fitting(self, given: Tensor) -> Tensor:
        try:
            return given.detach().expand_as(self.end)
        except RuntimeError:
            raise InputError(
                f"baseline= has the shape {list(given.shape)}, and the activation "
                f"{list(self.end.shape)}."
            ) from None

    def _embedding(self, kind: str) -> Tensor:
        if self._name != "embed_out":
            raise InputError(f"baseline={kind!r} is of token embeddings: activation='embed_out'.")
        if kind == "mean":
            return self._model.W_E.detach().mean(0).expand_as(self.end)
        pad = getattr(self._model.tokenizer, "pad_token_id", None)
        if pad is None:
            raise InputError("baseline='pad': the tokenizer has no token for padding.")
        return self._model.W_E.detach()[pad].expand_as(self.end)


def _kept(activation: str) -> tuple[str, ...]:
    return tuple(name for name in KEPT if name in axes_of(activation))


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Points in 0 to 1 and their weights: Gauss-Legendre, exact for degree 2 * count - 1."""
    if count < 1:
        raise InputError(f"steps= is at least 1, not {count}.")
    points, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
