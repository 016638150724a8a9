"""Gradient times input: to first order, what each place of an activation gives to a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from tracekit.analysis.gradients import gradients_of, name_at
from tracekit.analysis.labelled import Labelled
from tracekit.analysis.metrics import Measure, name_of
from tracekit.analysis.places import (
    added_up,
    axes_known,
    axes_of,
    check_over,
    is_of_layers,
    stacked_layers,
    unfolded,
)
from tracekit.analysis.prompts import read_prompts
from tracekit.capture import showing_own_lines
from tracekit.models.language import LanguageModel

KEPT: Final = ("layer", "position", "head", "key")  # axes that a score is told for, unless asked


@showing_own_lines
def gradient_x_input(
    model: LanguageModel,
    input: Any,
    metric: Measure,
    *,
    activation: str = "embed_out",
    layer: int | None = None,
    over: Sequence[str] | None = None,
) -> Labelled:
    """The gradient of a metric times the activation it is of: [position] of token embeddings.

    Of an activation of layers, of all or of one: [layer, position], with "head" or "key" behind
    where it has them; `over` says which axes to keep. The mean over prompts, the sum over all
    else. Exact where the rest of the model is linear. Shrikumar et al. 2016; Simonyan et al. 2013.
    """
    over = check_over(activation, _kept(activation) if over is None else over)
    prompts = read_prompts(model, input)
    found = gradients_of(model, prompts, [name_at(activation, layer)], metric)[activation]
    products = {
        each: unfolded(product(value, found.gradients[each]), activation, prompts)
        for each, value in found.values.items()
    }
    values, layers = stacked_layers(products, activation)
    known = axes_known(model, prompts, over, layers, "gradient_x_input")
    return added_up(values, activation, over, known, f"gradient x input of {name_of(metric)}")


def product(value: Tensor, gradient: Tensor) -> Tensor:
    """The product, which is 0 where there is no gradient, also of a masked score's infinity.

    In float32 at least, as it is to be added up.
    """
    exact = torch.promote_types(value.dtype, torch.float32)
    return (value.to(exact) * gradient).masked_fill(gradient == 0, 0)


def _kept(activation: str) -> tuple[str, ...]:
    there = {*axes_of(activation), *(["layer"] if is_of_layers(activation) else [])}
    return tuple(name for name in KEPT if name in there)
