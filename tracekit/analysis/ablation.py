"""Ablation: what the metric loses when a component says nothing, the usual, or something else."""

# Zero takes away more than what a component says of this prompt: it takes its mean, too, which the
# rest of the model counts on. Mean: Wang et al. 2022, "Interpretability in the Wild". Resample,
# from other prompts: Chan et al. 2022, "Causal Scrubbing".

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.batches import MEMORY, chunks, repeated, rows_that_fit
from tracekit.analysis.gradients import name_at
from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Measure, measured, name_of
from tracekit.analysis.places import axes_known, axes_of, check_over, is_of_layers, unfolded
from tracekit.analysis.prompts import Prompts, alike, last_logits, numbered, read_prompts
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.face import Placed
from tracekit.models.language import LanguageModel

WAYS: Final = ("zero", "mean", "resample")


@showing_own_lines
@torch.no_grad()
def ablation_sweep(
    model: LanguageModel,
    input: Any,
    metric: Measure,
    over: Sequence[str] = ("layer", "head"),
    activation: str = "z",
    how: str = "zero",
    reference: Any = None,
    *,
    by_position: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
) -> Labelled:
    """By how much the metric changes when each component alone is ablated: `[layer, head]`.

    A component is a place on the axes `over` of an activation: ("layer", "head") of "z", ("layer",)
    of "mlp_out", ("layer", "neuron") of "mlp_post", ("layer", "position"). `how` is "zero"; "mean",
    of the tokens of the prompts `reference` (None: of `input` itself), or with `by_position` of
    each position by itself; or "resample", the activation in another prompt of `reference`, drawn
    by `seed` for each prompt. The mean over prompts of (ablated - clean), in units of the metric.
    """
    over = check_over(activation, over)
    if "layer" not in over and is_of_layers(activation):
        raise InputError(f'{activation} is of layers: over=("layer", …).')
    if "prompt" in over:
        raise InputError("an ablation is the same in all prompts: no over=('prompt', …).")
    prompts = read_prompts(model, input)
    if "position" in over or "key" in over:
        alike(prompts, "ablation_sweep")
    given = prompts if reference is None else read_prompts(model, reference)
    found = _usual(model, activation, prompts)
    put = replacements(model, activation, how, given, prompts, by_position, seed)
    sweep = _Sweep(model, prompts, metric, activation, [each for each in over if each != "layer"])
    rows = rows_that_fit(model, prompts, memory)
    values = {layer: sweep.of_layer(layer, found[layer], put[layer], rows) for layer in found}
    return _labelled(model, prompts, metric, activation, over, how, values)


@showing_own_lines
@torch.no_grad()
def ablate(
    model: LanguageModel,
    places: Iterable[tuple[Any, ...]],
    how: str = "zero",
    reference: Any = None,
) -> Placed:
    """`with ablate(model, [("z", 2, 1), ("mlp_out", 0)]):` every run has all of them ablated.

    A place is an activation, a layer and, if not all of it is meant, a head or a neuron. `how` is
    "zero", or "mean", of the tokens of the prompts `reference`.
    """
    if how not in ("zero", "mean") or (how == "mean") is (reference is None):
        raise InputError("how= is 'zero', or 'mean' with reference= prompts.")
    wanted: dict[tuple[str, Any], list[Any]] = {}
    for place in places:
        if len(place) not in (2, 3) or not isinstance(place[0], str):
            raise InputError(
                f"a place is (activation, layer), or (activation, layer, head) as in ('z', 2, 1); "
                f"not {place!r}."
            )
        wanted.setdefault((place[0], place[1]), []).append(place[2] if len(place) == 3 else None)
    given = None if reference is None else read_prompts(model, reference)
    means: dict[str, dict[int | None, Tensor]] = {}
    for name, _ in wanted:
        if given is not None and name not in means:
            means[name] = replacements(model, name, how, given, given, False, 0)
    hooks: list[Any] = [
        (name_at(name, layer), _setting(name, indices, means.get(name)))
        for (name, layer), indices in wanted.items()
    ]
    return model.hooks(fwd_hooks=hooks)


# -- what takes the place -------------------------------------------------------------------------


def replacements(
    model: LanguageModel,
    activation: str,
    how: str,
    given: Prompts,
    prompts: Prompts,
    by_position: bool,
    seed: int,
) -> dict[int | None, Tensor]:
    """What takes an activation's place, by layer: `[prompts, …]`, or 1 for an axis alike all over.

    `given` are the prompts that it is taken from.
    """
    if how not in WAYS:
        raise InputError(f"how= is 'zero', 'mean' or 'resample', not {how!r}.")
    values = _usual(model, activation, given)
    if how == "zero":
        return {layer: torch.zeros_like(value[:1]) for layer, value in values.items()}
    if how == "resample":
        rows = _others(given, prompts, seed)
        return {layer: value[rows] for layer, value in values.items()}
    if by_position:
        if alike(given, "a mean by position").length != prompts.length:
            raise InputError("by_position=True: the prompts of reference= are of another length.")
        return {layer: value.mean(0, keepdim=True) for layer, value in values.items()}
    return {layer: _mean(value, activation, given) for layer, value in values.items()}


def _mean(value: Tensor, activation: str, given: Prompts) -> Tensor:
    """The mean over all tokens, with rows and positions as axes of one: `[1, 1, …]`."""
    axes = axes_of(activation)
    if "key" in axes or axes[:2] != ("prompt", "position"):
        raise InputError(
            f"{activation} has no mean over positions: by_position=True, or how='resample'."
        )
    return value[given.is_token.to(value.device)].mean(0)[None, None]


def _others(given: Prompts, prompts: Prompts, seed: int) -> Tensor:
    """For each prompt, another row of `given`: never the same tokens."""
    if alike(given, "resampling").length != alike(prompts, "resampling").length:
        raise InputError("how='resample': the prompts of reference= are of another length.")
    draw = torch.Generator().manual_seed(seed)
    found: list[int] = []
    for ids in prompts.ids:
        others = (given.ids != ids).any(1).nonzero()[:, 0].tolist()
        if not others:
            raise InputError("how='resample' needs other prompts: reference=[…].")
        found.append(others[int(torch.randint(len(others), (), generator=draw))])
    return torch.tensor(found)


def _usual(model: LanguageModel, activation: str, prompts: Prompts) -> dict[int | None, Tensor]:
    """The activation in a run, by layer."""
    found: dict[int | None, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:
        found[hook.layer()] = unfolded(tensor.clone(), activation, prompts)

    model.run_with_hooks(**prompts.inputs, fwd_hooks=[(activation, keep)])
    return found


def _setting(
    activation: str, indices: list[Any], means: dict[int | None, Tensor] | None
) -> Callable[[Tensor, Any], Tensor]:
    axes = axes_of(activation)
    named = [place for place, name in enumerate(axes) if name in ("head", "neuron", "expert")]

    def put(tensor: Tensor, hook: Any) -> Tensor:
        if means is None:
            value = torch.zeros_like(tensor)
        else:
            mean = means[hook.layer()]
            value = (mean if tensor.dim() == mean.dim() else mean[0]).expand_as(tensor)
        if None in indices:
            return value
        if not named:
            raise InputError(f"{activation} has neither heads nor neurons: name the layer alone.")
        new = tensor.clone()
        for index in indices:  # axes behind it are the same in a folded tensor
            at = (..., index, *[slice(None)] * (len(axes) - named[0] - 1))
            new[at] = value[at]
        return new

    return put


# -- a sweep --------------------------------------------------------------------------------------


@final
@dataclass
class _Sweep:
    """Each component of an activation ablated by itself, as rows of batches."""

    model: LanguageModel
    prompts: Prompts
    metric: Measure
    activation: str
    inner: list[str]  # the axes whose places are ablated each

    def __post_init__(self) -> None:
        output = self.model.run_with_hooks(**self.prompts.inputs)
        self.clean = measured(self.metric, last_logits(self.prompts, output))

    def of_layer(self, layer: int | None, usual: Tensor, put: Tensor, rows: int) -> Tensor:
        """The change for each place of a layer: one axis for each of `inner`."""
        axes = axes_of(self.activation)
        where = [axes.index(name) for name in self.inner]
        sizes = [usual.shape[axis] for axis in where]
        every = list(product(*map(range, sizes)))
        put = put.expand_as(usual)
        found = [self._changes(layer, where, every[part], put) for part in chunks(len(every), rows)]
        return torch.cat(found).reshape(sizes)

    def _changes(
        self, layer: int | None, where: list[int], places: list[tuple[int, ...]], put: Tensor
    ) -> Tensor:
        many = repeated(self.prompts, len(places))

        def replace(tensor: Tensor, hook: Any) -> Tensor:
            new = unfolded(tensor.clone(), self.activation, many)
            each = new.unflatten(0, (len(places), len(self.prompts)))
            for row, place in enumerate(places):
                index: list[Any] = [slice(None)] * put.dim()
                for axis, at in zip(where, place, strict=True):
                    index[axis] = at
                each[(row, *index)] = put[tuple(index)]
            return new.reshape(tensor.shape)

        hooks = [(name_at(self.activation, layer), replace)]
        output = self.model.run_with_hooks(**many.inputs, fwd_hooks=hooks)
        logits = last_logits(many, output).unflatten(0, (len(places), len(self.prompts)))
        return torch.stack([(measured(self.metric, one) - self.clean).mean() for one in logits])


def _labelled(
    model: LanguageModel,
    prompts: Prompts,
    metric: Measure,
    activation: str,
    over: Sequence[str],
    how: str,
    values: dict[int | None, Tensor],
) -> Labelled:
    layers = [layer for layer in values if layer is not None]
    known = axes_known(model, prompts, over, layers, "ablation_sweep")
    if len({value.shape for value in values.values()}) > 1:
        raise InputError(f"{activation} is not of one shape in all layers.")
    found = torch.stack(list(values.values())) if layers else values[None]
    names = [name for name in ("layer", *over) if name in over]  # the layer first, as they lie
    names = list(dict.fromkeys(names))
    found = found.permute(*(names.index(name) for name in over))
    axes: list[Axis] = [
        known.get(name) or numbered(name, count)
        for name, count in zip(over, found.shape, strict=True)
    ]
    return Labelled(found, axes, f"change of {name_of(metric)}, {how} ablation of {activation}")
