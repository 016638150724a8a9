"""Attribution patching: all patches of a sweep at once, each to first order."""

# Nanda 2023, "Attribution Patching"; Kramar et al. 2024, "AtP*". The metric is taken to be linear
# between the two runs. Where it is not (a softmax that is saturated, a norm whose input is replaced
# as a whole) the exact sweep says something else: it is what these numbers are to be held against.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tracekit.analysis.gradients import gradients_of, name_at
from tracekit.analysis.labelled import Labelled
from tracekit.analysis.metrics import Measure, name_of
from tracekit.analysis.places import (
    added_up,
    axes_known,
    check_over,
    stacked_layers,
    unfolded,
)
from tracekit.analysis.prompts import Direction, Prompts, check_direction, read_pair
from tracekit.analysis.saliency import product
from tracekit.capture import showing_own_lines
from tracekit.models.language import LanguageModel


@showing_own_lines
def attribution_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Measure,
    over: Sequence[str] = ("layer", "position"),
    *,
    activation: str = "resid_pre",
    direction: Direction = "denoise",
) -> Labelled:
    """By how much the metric would change, to first order, for each patch: `[layer, position]`.

    "denoise" puts what an activation is for `clean` into the run of `corrupted`, and "noise" the
    other way round: (what is put in, less what is there) times the gradient there. Two forward
    passes and one backward for all patches; patch_sweep has the metric itself behind each, exactly.
    `over` says which axes to keep: "layer", "position" (labelled by the clean tokens), "head",
    "prompt", what the activation has; over all others it is one patch of all, and the mean over
    prompts. `clean` and `corrupted` are one prompt each, or as many, of as many tokens.
    Nanda 2023; Kramár et al. 2024 (AtP*).
    """
    over = check_over(activation, over)
    check_direction(direction)
    pair = read_pair(model, clean, corrupted)
    source, into = pair if direction == "denoise" else pair[::-1]
    found = gradients_of(model, into, [name_at(activation, None)], metric)[activation]
    put = _recorded(model, source, activation)
    changes = {
        layer: unfolded(product(put[layer] - value, found.gradients[layer]), activation, into)
        for layer, value in found.values.items()
    }
    values, layers = stacked_layers(changes, activation)
    known = axes_known(model, pair[0], over, layers, "attribution_patching")
    return added_up(
        values, activation, over, known, f"change of {name_of(metric)} to first order, {direction}"
    )


@torch.no_grad()
def _recorded(
    model: LanguageModel, prompts: Prompts, activation: str
) -> dict[int | None, torch.Tensor]:
    found: dict[int | None, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, hook: Any) -> None:
        found[hook.layer()] = tensor.clone()

    model.run_with_hooks(**prompts.inputs, fwd_hooks=[(activation, keep)])
    return found
