"""A run with the gradient of its metric at activations: one forward pass, and one backward."""

# To each activation a zero is added whose gradient is asked for: it is the gradient of what is read
# there, whoever else has the tensor, and parameters keep theirs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from tracekit.analysis.metrics import Measure, measured
from tracekit.analysis.prompts import Prompts, last_logits
from tracekit.errors import GradientError
from tracekit.models.language import LanguageModel


@final
@dataclass
class Gradients:
    """Activations and the gradients of the sum of a metric there, by layer (None: of the model)."""

    values: dict[int | None, Tensor] = field(default_factory=dict[int | None, Tensor])
    gradients: dict[int | None, Tensor] = field(default_factory=dict[int | None, Tensor])
    metric: Tensor = field(default_factory=lambda: torch.empty(0))  # [prompts]


def name_at(activation: str, layer: int | None) -> Any:
    """The name of an activation in one layer, or in all."""
    return activation if layer is None else (activation, layer)


def gradients_of(
    model: LanguageModel,
    prompts: Prompts,
    names: Sequence[Any],
    metric: Measure,
    *,
    inputs: dict[str, Any] | None = None,
    hooks: Sequence[tuple[Any, Any]] = (),
) -> dict[str, Gradients]:
    """The gradients of a metric at activations, for each name that was asked for by its word.

    `hooks` come first. GradientError for a metric that has none there.
    """
    zeros: dict[tuple[str, int | None], Tensor] = {}
    values: dict[tuple[str, int | None], Tensor] = {}

    def watch(tensor: Tensor, hook: Any) -> Tensor:
        place = (hook.key.rpartition(".")[2], hook.layer())
        values[place] = tensor.detach().clone()
        zeros[place] = torch.zeros_like(tensor).requires_grad_()
        return tensor + zeros[place]

    given = prompts.inputs if inputs is None else inputs
    pairs = [*hooks, *((name, watch) for name in names)]
    with torch.inference_mode(False), torch.enable_grad():
        output = model.run_with_hooks(**given, fwd_hooks=pairs)
        found = measured(metric, last_logits(prompts, output))
        if not found.requires_grad:
            raise GradientError(
                "the metric has no gradient: it is computed with what has none (argmax, .item(), "
                "torch.no_grad())."
            )
        every = torch.autograd.grad(found.sum(), list(zeros.values()), allow_unused=True)
    return _by_word(list(zeros), values, every, found.detach())


def _by_word(
    places: list[tuple[str, int | None]],
    values: dict[tuple[str, int | None], Tensor],
    every: Sequence[Tensor | None],
    metric: Tensor,
) -> dict[str, Gradients]:
    found: dict[str, Gradients] = {}
    for place, gradient in zip(places, every, strict=True):
        word, layer = place
        if gradient is None:
            at = word if layer is None else f"layers.{layer}.{word}"
            raise GradientError(f"the metric does not depend on {at}: nothing reads it.")
        each = found.setdefault(word, Gradients(metric=metric))
        each.values[layer], each.gradients[layer] = values[place], gradient
    return found
