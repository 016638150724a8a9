"""Steering vectors: directions from contrasted prompts, added in a run to change what it says."""

# Turner et al. 2023, "Activation Addition"; Rimsky et al. 2023, "Contrastive Activation Addition".

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Measure, measured, name_of
from tracekit.analysis.places import axes_of, is_of_layers, unfolded
from tracekit.analysis.prompts import Prompts, last_logits, read_prompts
from tracekit.capture import showing_own_lines
from tracekit.core.nest import on_one_device
from tracekit.errors import InputError
from tracekit.models.face import Placed
from tracekit.models.language import LanguageModel

SCALES: Final = (0.0, 0.5, 1.0, 2.0, 4.0)


@final
@dataclass(frozen=True, repr=False)
class SteeringVector:
    """A direction at each of some layers: `vectors` is `[layers, model]`, or what is there."""

    activation: str
    layers: tuple[int, ...]
    vectors: Tensor

    def at(self, layer: int) -> SteeringVector:
        """That of one layer alone."""
        if layer not in self.layers:
            raise InputError(
                f"layer {layer}: the vectors are of {', '.join(map(str, self.layers))}."
            )
        place = self.layers.index(layer)
        return SteeringVector(self.activation, (layer,), self.vectors[place : place + 1])

    def unit(self) -> SteeringVector:
        """The same directions with length 1."""
        lengths = self.vectors.flatten(1).norm(dim=1).view(-1, *[1] * (self.vectors.dim() - 1))
        return SteeringVector(self.activation, self.layers, self.vectors / lengths)

    @showing_own_lines
    def steer(self, model: LanguageModel, scale: float = 1.0, layer: int | None = None) -> Placed:
        """`with vector.steer(model, 2.0):` adds it to all positions in every run of the block.

        In traces, calls, and each step of generations. Of vectors of several layers, `layer` says
        which one.
        """
        one = self if layer is None else self.at(layer)
        if len(one.layers) != 1:
            raise InputError(
                f"one layer is steered at a time: layer= is one of {list(one.layers)}."
            )
        added = scale * one.vectors[0]

        def add(tensor: Tensor, hook: Any) -> Tensor:
            return tensor + added.to(tensor)

        return model.hooks(fwd_hooks=[((one.activation, one.layers[0]), add)])

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        vectors = self.vectors.tolist()
        return {"activation": self.activation, "layers": list(self.layers), "vectors": vectors}

    def __repr__(self) -> str:
        lengths = self.vectors.flatten(1).norm(dim=1).tolist()
        told = ", ".join(
            f"{layer}: {length:.3g}" for layer, length in zip(self.layers, lengths, strict=True)
        )
        return f"SteeringVector({self.activation}; lengths by layer: {told})"


@showing_own_lines
@torch.no_grad()
def steering_vector(
    model: LanguageModel,
    positive: Any,
    negative: Any,
    layer: int | Sequence[int] | None = None,
    activation: str = "resid_post",
    position: int | None = -1,
) -> SteeringVector:
    """The mean of an activation over some prompts less that over others, of each layer.

    `layer` is one, or several; None is all that have it. `position` counts each prompt's own tokens
    (-1: its last); None is the mean over all of them. Turner et al. 2023; Rimsky et al. 2023.
    """
    if axes_of(activation)[:2] != ("prompt", "position") or not is_of_layers(activation):
        raise InputError(f"{activation} is no activation of each position in layers.")
    high = _means(model, read_prompts(model, positive), activation, position)
    low = _means(model, read_prompts(model, negative), activation, position)
    count = len(model.layers)
    wanted = list(high) if layer is None else [layer] if isinstance(layer, int) else list(layer)
    layers = [each + count if each < 0 else each for each in wanted]
    for each in layers:
        if each not in high:
            raise InputError(f"layer {each} has no {activation}; there are {count} layers.")
    vectors = torch.stack(on_one_device(high[each] - low[each] for each in layers))
    return SteeringVector(activation, tuple(layers), vectors)


@final
@dataclass(frozen=True, repr=False)
class DoseCurve:
    """What steering does as its scale grows, `[layer, scale]`, the mean over prompts.

    `metric`, and `divergence`: KL(unsteered | steered) of the next token, in nats: what the metric
    costs.
    """

    metric: Labelled
    divergence: Labelled

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        return {"metric": self.metric.to_json(), "divergence": self.divergence.to_json()}

    def __repr__(self) -> str:
        return f"DoseCurve\n{self.metric}\n{self.divergence}"


@showing_own_lines
@torch.no_grad()
def dose_curve(
    model: LanguageModel,
    vector: SteeringVector,
    input: Any,
    metric: Measure,
    scales: Sequence[float] = SCALES,
) -> DoseCurve:
    """The metric of some prompts steered by each scale, at each layer of `vector` alone.

    Turner et al. 2023 and Rimsky et al. 2023 have such curves: too much of a direction takes the
    model away from anything it says.
    """
    prompts = read_prompts(model, input)
    clean = _logits(model, prompts)
    values = torch.zeros(2, len(vector.layers), len(scales))
    for row, layer in enumerate(vector.layers):
        for column, scale in enumerate(scales):
            with vector.at(layer).steer(model, scale):
                logits = _logits(model, prompts)
            values[0, row, column] = measured(metric, logits).mean()
            values[1, row, column] = _divergence(clean, logits)
    axes = (
        Axis("layer", tuple(map(str, vector.layers))),
        Axis("scale", tuple(f"{each:g}" for each in scales)),
    )
    return DoseCurve(
        Labelled(values[0], axes, name_of(metric)),
        Labelled(values[1], axes, "KL from the unsteered, in nats"),
    )


def _logits(model: LanguageModel, prompts: Prompts) -> Tensor:
    return last_logits(prompts, model.run_with_hooks(**prompts.inputs))


def _divergence(clean: Tensor, steered: Tensor) -> Tensor:
    before, after = clean.float().log_softmax(-1), steered.float().log_softmax(-1)
    return (before.exp() * (before - after)).nan_to_num().sum(-1).mean()


def _means(
    model: LanguageModel, prompts: Prompts, activation: str, position: int | None
) -> dict[int, Tensor]:
    """The mean over prompts, or all their tokens, by layer."""
    counts = prompts.is_token.sum(1)
    if position is not None and not -counts.min() <= position < counts.min():
        raise InputError(f"position={position}: the shortest prompt has {counts.min()} tokens.")
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        value = unfolded(tensor, activation, prompts)
        own = zip(value, prompts.is_token.to(value.device), strict=True)
        each = [row[mask] if position is None else row[mask][position][None] for row, mask in own]
        found[hook.layer()] = torch.cat(each).float().mean(0)

    model.run_with_hooks(**prompts.inputs, fwd_hooks=[(activation, keep)])
    return found
