"""Linear probes: whether an activation tells a property of the prompt, by layer and position."""

# Alain and Bengio 2016; the control is that of Hewitt and Liang 2019, "Designing and Interpreting
# Probes with Control Tasks": a probe that learns shuffled labels as well says nothing of the model.

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.batches import MEMORY, chunks, in_parts
from tracekit.analysis.fitting import METHODS, Linear, balanced, credits_of, fit
from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.places import axes_of, is_of_layers, unfolded
from tracekit.analysis.prompts import Prompts, alike, position_axis, read_prompts
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel

PENALTY: Final = 0.01  # of logistic regression, on features of spread 1


@final
@dataclass(frozen=True, repr=False)
class Probes:
    """A linear probe for each layer and position, and how well it does on prompts it never saw.

    `accuracy` is the mean over classes of the share that is right, [layer, position]: chance is
    `1 / len(classes)`, however many prompts a class has. `control` is what the same probe makes of
    shuffled labels. `weights` `[layer, position, class, feature]` and `biases` are of probes that
    saw all prompts; `folds` says in which part each prompt was tested.
    """

    accuracy: Labelled
    control: Labelled
    classes: tuple[Any, ...]
    folds: Tensor
    weights: Tensor
    biases: Tensor

    @property
    def selectivity(self) -> Labelled:
        """The accuracy less that of the control."""
        values = self.accuracy.values - self.control.values
        return Labelled(values, self.accuracy.axes, "selectivity")

    def direction(self, layer: int | str, position: int | str = -1) -> Tensor:
        """From the first class to the second, `[feature]`, of a probe for two classes."""
        if len(self.classes) != 2:
            raise InputError(f"there are {len(self.classes)} classes, and no one direction.")
        numbers = torch.arange(self.weights[..., 0, 0].numel()).view(self.accuracy.shape)
        at = Labelled(numbers, self.accuracy.axes).at(layer=layer, position=position).item()
        low, high = self.weights.flatten(0, 1)[int(at)]
        return high - low

    def to_json(self) -> dict[str, Any]:
        """The accuracies in lists and strings."""
        return {
            "classes": [str(each) for each in self.classes],
            "accuracy": self.accuracy.to_json(),
            "control": self.control.to_json(),
        }

    def __repr__(self) -> str:
        (best,) = self.accuracy.top(1)
        control = self.control.values[best.place]
        return (
            f"Probes({len(self.folds)} prompts, {len(self.classes)} classes: best at layer "
            f"{best.labels[0]}, position {best.labels[1]!r}: {best.value:.0%}; control "
            f"{float(control):.0%})\n{self.accuracy}"
        )


@showing_own_lines
@torch.no_grad()
def probe(
    model: LanguageModel,
    prompts: Any,
    labels: Sequence[Hashable],
    activation: str = "resid_post",
    positions: Sequence[int] | None = None,
    method: str = "logistic",
    folds: int = 5,
    *,
    controls: int = 3,
    penalty: float = PENALTY,
    seed: int = 0,
    memory: int = MEMORY,
) -> Probes:
    """Probes of a label of each prompt, at every layer and position: `probe(model, texts, labels)`.

    `positions` count each prompt's own tokens (-1: its last); None is all of them, of prompts of as
    many tokens. `method` is "logistic", a regression with L2 `penalty`, or "means", the nearest
    mean of a class (for two, along the difference of means). Tested by `folds`, in each of which
    classes have their share; the same prompt is never on both sides. Controls are `controls`
    shufflings of the labels among different prompts. Less than chance is nothing either: of what
    many prompts share, the others in a class tell the opposite. InputError for labels of one class.
    """
    if method not in METHODS:
        raise InputError(f"method= is 'logistic' or 'means', not {method!r}.")
    if axes_of(activation)[:2] != ("prompt", "position") or not is_of_layers(activation):
        raise InputError(f"{activation} is no activation of each position in layers.")
    read = read_prompts(model, prompts)
    classes, own = _classes(labels, len(read))
    groups = read.ids.masked_fill(~read.is_token, -1).unique(dim=0, return_inverse=True)[1].cpu()
    parts = _parts(own, groups, folds, seed)
    axis = _axis(model, read, positions)
    found = _features(model, read, activation, positions, memory)
    layers = sorted(found)
    tests = _Tests(_shuffled(own, groups, controls, seed), parts, len(classes), method, penalty)
    results = [tests.of_layer(found[layer], memory) for layer in layers]
    scores = torch.stack([each for each, _ in results], 1)  # [k, layers, positions]
    axes = (Axis("layer", tuple(map(str, layers))), axis)
    return Probes(
        Labelled(scores[0], axes, "balanced accuracy"),
        Labelled(scores[1:].mean(0), axes, "balanced accuracy on shuffled labels"),
        classes,
        parts,
        torch.stack([each.weight for _, each in results]),
        torch.stack([each.bias for _, each in results]),
    )


@final
@dataclass(frozen=True)
class _Tests:
    """What is fitted on the activations of each layer."""

    labels: Tensor  # [k, n]; the true ones first
    parts: Tensor  # [n]
    classes: int
    method: str
    penalty: float

    def of_layer(self, x: Tensor, memory: int) -> tuple[Tensor, Linear]:
        """Accuracies `[k, p]` of samples `[n, p, d]`, and the probes of all, `[p, c, d]`."""
        folds = int(self.parts.max()) + 1
        size = 4 * (folds + 1) * x[:, 0].numel() * x.element_size()
        done = [self._of(x[:, at]) for at in chunks(x.shape[1], max(1, memory // size))]
        whole = [each for _, each in done]
        probes = Linear(
            torch.cat([one.weight for one in whole]), torch.cat([one.bias for one in whole])
        )
        return torch.cat([each for each, _ in done], 1), probes

    def _of(self, x: Tensor) -> tuple[Tensor, Linear]:
        folds = int(self.parts.max()) + 1
        train = torch.stack([*(self.parts != fold for fold in range(folds)), self.parts >= 0])
        found = fit(x, self.labels, train, self.classes, self.method, self.penalty)
        credits = credits_of(found.scores(x), self.labels)  # [k, f, p, n]
        own = self.parts.view(1, 1, 1, -1).expand(len(credits), 1, *credits.shape[2:])
        tested = credits.gather(1, own)[:, 0]
        last = Linear(found.weight[0, -1], found.bias[0, -1])
        return balanced(tested, self.labels, self.classes), last


# -- labels ---------------------------------------------------------------------------------------


def _classes(labels: Sequence[Hashable], count: int) -> tuple[tuple[Any, ...], Tensor]:
    """The classes, in order, and the number of each prompt's."""
    given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if len(given) != count:
        raise InputError(f"{len(given)} labels for {count} prompts: one for each.")
    classes = tuple(sorted(set(given), key=lambda each: (str(type(each)), each)))
    if len(classes) < 2:
        raise InputError(f"all labels are {given[0]!r}: a probe tells two classes apart, or more.")
    return classes, torch.tensor([classes.index(each) for each in given])


def _parts(labels: Tensor, groups: Tensor, folds: int, seed: int) -> Tensor:
    """The fold that each prompt is tested in; the same prompts are in one."""
    draw = torch.Generator().manual_seed(seed)
    parts = torch.zeros_like(labels)
    fewest = min(len(groups[labels == each].unique()) for each in labels.unique())
    if fewest < 2 or folds < 2:
        raise InputError(
            "a probe is tested on prompts that it did not see: each class takes two different "
            "prompts or more, and folds= is at least 2."
        )
    folds, begin = min(folds, fewest), 0
    first = {int(group): int(labels[groups == group][0]) for group in groups.unique()}
    for each in labels.unique().tolist():
        own = torch.tensor([group for group, label in first.items() if label == each])
        for place, at in enumerate(torch.randperm(len(own), generator=draw).tolist()):
            parts[groups == own[at]] = (begin + place) % folds
        begin += len(own)
    return parts


def _shuffled(labels: Tensor, groups: Tensor, controls: int, seed: int) -> Tensor:
    """The labels, and behind them shuffled ones: `[1 + controls, n]`, the same for same prompts."""
    if controls < 1:
        raise InputError(f"controls= is at least 1, not {controls}.")
    draw = torch.Generator().manual_seed(seed + 1)
    first = torch.stack([labels[groups == group][0] for group in groups.unique()])
    orders = [torch.randperm(len(first), generator=draw) for _ in range(controls)]
    return torch.stack([labels, *(first[order][groups] for order in orders)])


# -- activations ----------------------------------------------------------------------------------


def _axis(model: LanguageModel, prompts: Prompts, positions: Sequence[int] | None) -> Axis:
    if positions is None:
        return position_axis(model, alike(prompts, "probe without positions="))
    fewest = int(prompts.is_token.sum(1).min())
    for each in positions:
        if not -fewest <= each < fewest:
            raise InputError(f"position {each}: the shortest prompt has {fewest} tokens.")
    return Axis("position", tuple(map(str, positions)))


def _features(
    model: LanguageModel,
    prompts: Prompts,
    activation: str,
    positions: Sequence[int] | None,
    memory: int,
) -> dict[int, Tensor]:
    """The activation by layer, `[prompts, positions, features]`, in float32 on the CPU."""
    found: dict[int, list[Tensor]] = {}
    for part in in_parts(model, prompts, memory):

        def keep(tensor: Tensor, hook: Any, part: Prompts = part) -> None:
            value = unfolded(tensor, activation, part).float().cpu().flatten(2)
            own = zip(value, part.is_token.cpu(), strict=True)
            each = [
                row[mask][list(positions)] if positions is not None else row for row, mask in own
            ]
            found.setdefault(hook.layer(), []).append(torch.stack(each))

        model.run_with_hooks(**part.inputs, fwd_hooks=[(activation, keep)])
    return {layer: torch.cat(each) for layer, each in found.items()}
