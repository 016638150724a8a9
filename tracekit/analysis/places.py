"""Which axes the values of an activation have, and how they are added up over some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.prompts import (
    Prompts,
    alike,
    numbered,
    position_axis,
    prompt_axis,
)
from tracekit.core.nest import on_one_device
from tracekit.core.words import BLOCK_ACTIVATIONS, ROOT_ACTIVATIONS
from tracekit.errors import InputError, did_you_mean
from tracekit.models.language import LanguageModel

# Axes of shapes, and what they are called here; those beside them are always added up.
_CALLED: Final = {
    "batch": "prompt",
    "1|batch": "prompt",
    "pos": "position",
    "heads": "head",
    "kv_heads": "head",
    "key": "key",
    "neurons": "neuron",
    "model": "feature",
    "experts": "expert",
}


def axes_of(activation: str) -> tuple[str, ...]:
    """What each axis of a standard activation counts: ("prompt", "position", "head", "head_dim").

    InputError for a name that is none.
    """
    word = BLOCK_ACTIVATIONS.get(activation) or ROOT_ACTIVATIONS.get(activation)
    if word is None:
        names = [*BLOCK_ACTIVATIONS, *ROOT_ACTIVATIONS]
        cure = did_you_mean(activation, names)
        raise InputError(f"{activation!r} is no standard activation{cure or '.'}")
    shape = word.shape.replace("batch*pos", "batch pos")
    return tuple(_CALLED.get(each, each) for each in shape.split())


def is_of_layers(activation: str) -> bool:
    """Whether each layer has one."""
    return activation in BLOCK_ACTIVATIONS


def check_over(activation: str, over: Sequence[str]) -> tuple[str, ...]:
    """`over`; InputError for an axis that the activation does not have."""
    there = ("layer", *axes_of(activation)) if is_of_layers(activation) else axes_of(activation)
    if isinstance(over, str):
        raise InputError(f"over= is a tuple of axes, as ('layer', 'position'); not {over!r}.")
    for name in over:
        if name not in there:
            cure = did_you_mean(name, there)
            raise InputError(
                f"over={name!r}: {activation} has the axes {', '.join(there)}{cure or '.'}"
            )
    if len(set(over)) < len(over):
        raise InputError(f"over={tuple(over)}: each axis once.")
    return tuple(over)


def unfolded(value: Tensor, activation: str, prompts: Prompts) -> Tensor:
    """A value with rows and positions apart, also where the model has them in one axis."""
    axes = axes_of(activation)
    if value.dim() == len(axes) - 1 and len(value) == prompts.ids.numel():
        return value.unflatten(0, tuple(prompts.ids.shape))
    return value


def added_up(
    values: Tensor,
    activation: str,
    over: Sequence[str],
    known: dict[str, Axis],
    what: str,
) -> Labelled:
    """`[layers, prompts, …]`, or without layers, over some axes: the mean of prompts, the sum of
    all others. `known` are the axes that have labels of their own."""
    names = ["layer"] * is_of_layers(activation) + list(axes_of(activation))
    gone = [place for place, name in enumerate(names) if name not in over and name != "prompt"]
    found = values.sum(gone, keepdim=True) if gone else values
    if "prompt" in names and "prompt" not in over:
        found = found.mean(names.index("prompt"), keepdim=True)
    left = [place for place, name in enumerate(names) if name in over]
    found = found.permute(*(names.index(name) for name in over), *_others(names, left))
    found = found.reshape([values.shape[names.index(name)] for name in over])
    axes = [
        known.get(name) or numbered(name, count)
        for name, count in zip(over, found.shape, strict=True)
    ]
    return Labelled(found, axes, what)


def axes_known(
    model: LanguageModel, prompts: Prompts, over: Iterable[str], layers: Sequence[int], what: str
) -> dict[str, Axis]:
    """The axes whose labels are told by prompts and layers; InputError if positions differ."""
    found = {"layer": Axis("layer", tuple(map(str, layers)))}
    wanted = set(over)
    if wanted & {"position", "key"}:
        found["position"] = position_axis(model, alike(prompts, what))
        found["key"] = Axis("key", found["position"].labels)
    if "prompt" in wanted:
        found["prompt"] = prompt_axis(model, prompts)
    return found


def _others(names: list[str], left: list[int]) -> list[int]:
    return [place for place in range(len(names)) if place not in left]


def stacked_layers(values: dict[int | None, Tensor], activation: str) -> tuple[Tensor, list[int]]:
    """Values by layer as one tensor, and which layers; InputError if their shapes differ."""
    if not is_of_layers(activation):
        return values[None], []
    layers = sorted(each for each in values if each is not None)
    if len({values[each].shape for each in layers}) > 1:
        raise InputError(f"{activation} is not of one shape in all layers: name one, layer=.")
    return torch.stack(on_one_device(values[each] for each in layers)), layers
