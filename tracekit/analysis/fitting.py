"""Linear classifiers, many at a time: logistic regression, or the nearest mean of a class."""

# Shapes: k sets of labels, f folds, p positions, n samples, c classes, d features. Each of k, f, p
# is a problem of its own; the sum of their losses has the minimum of each, so one L-BFGS fits all.

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

METHODS: Final = ("logistic", "means")
ITERATIONS: Final = 100
ROUNDING: Final = 1e-5  # of the largest number at a position


class Linear(NamedTuple):
    """`x @ weight + bias` are the scores of the classes."""

    weight: Tensor  # [k, f, p, c, d]
    bias: Tensor  # [k, f, p, c]

    def scores(self, x: Tensor) -> Tensor:
        """Of samples `[n, p, d]`: `[k, f, p, n, c]`."""
        return torch.einsum("npd,kfpcd->kfpnc", x, self.weight) + self.bias.unsqueeze(-2)


def fit(
    x: Tensor, labels: Tensor, train: Tensor, classes: int, method: str, penalty: float
) -> Linear:
    """Classifiers of samples `[n, p, d]` by labels `[k, n]`, each on the samples `train`, `[f, n]`.

    Each class counts as much as any other, however many samples it has. Features are scaled by
    their spread among all samples.
    """
    center = x.mean(0)  # [p, d]
    scaled = (x - center).transpose(0, 1)  # [p, n, d]
    spread = scaled.square().mean(1).sqrt()
    is_same = spread <= ROUNDING * x.abs().amax((0, 2)).unsqueeze(-1)
    spread = spread.masked_fill(is_same, torch.inf)  # what differs by rounding tells nothing
    scaled = scaled / spread.unsqueeze(1)
    hot = torch.nn.functional.one_hot(labels, classes).to(x)  # [k, n, c]
    counts = torch.einsum("fn,knc->kfc", train.to(x), hot)
    member = torch.einsum("fn,knc->kfnc", train.to(x), hot) / counts.clamp(min=1).unsqueeze(2)
    if method == "means":
        weight, bias = _means(scaled, member, counts)
    else:
        weight, bias = _logistic(scaled, member / classes, penalty)
    weight = weight / spread.unsqueeze(-2)
    return Linear(weight, bias - torch.einsum("kfpcd,pd->kfpc", weight, center))


def _means(x: Tensor, member: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The scores say which mean is nearest; a class without samples is nowhere."""
    means = torch.einsum("pnd,kfnc->kfpcd", x, member)
    nowhere = torch.where(counts > 0, 0.0, -torch.inf).unsqueeze(2).to(x)
    return means, nowhere - means.square().sum(-1) / 2


def _logistic(x: Tensor, counted: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The minimum of the loss, in which a sample of a class counts as `counted`, `[k, f, n, c]`,
    and of `penalty / 2` times the squared weights.

    It is looked for along the principal axes of the samples, each as long as makes the loss about
    as steep there as anywhere: a few dozen steps are enough then.
    """
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    length = (sizes.square() / (4 * x.shape[1]) + penalty).rsqrt()
    along = left * (sizes * length).unsqueeze(1)  # [p, n, axes]
    problems = counted.shape[0], counted.shape[1], counted.shape[3]  # k, f, c
    slope = x.new_zeros(len(x), along.shape[2], math.prod(problems)).requires_grad_()
    bias = x.new_zeros(len(x), 1, math.prod(problems)).requires_grad_()
    counted = counted.permute(2, 0, 1, 3)  # [n, k, f, c]
    search = torch.optim.LBFGS(
        [slope, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-5
    )

    def loss() -> Tensor:
        search.zero_grad()
        scores = (along @ slope + bias).unflatten(-1, problems)
        total = -(scores.log_softmax(-1) * counted).sum()
        total = total + penalty / 2 * (length.unsqueeze(-1) * slope).square().sum()
        total.backward()  # pyright: ignore[reportUnknownMemberType] - torch's own
        return total

    with torch.inference_mode(False), torch.enable_grad():
        search.step(loss)  # pyright: ignore[reportArgumentType, reportUnknownMemberType] - a tensor is a number there
    weight = right.mT @ (length.unsqueeze(-1) * slope.detach())  # [p, d, k * f * c]
    weight = weight.unflatten(-1, problems).permute(2, 3, 0, 4, 1)
    return weight, bias.detach()[:, 0].unflatten(-1, problems).permute(1, 2, 0, 3)


def credits_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the best class is right, `[…, n]`, from scores `[k, …, n, c]` and labels `[k, n]`.

    Where several are best it is their share: a classifier that says nothing has what chance has.
    """
    best = scores.amax(-1, keepdim=True)
    tied = scores >= best - 1e-6 * best.abs().clamp(min=1)
    where = labels.view(len(labels), *[1] * (scores.dim() - 3), -1, 1)
    where = where.expand(*scores.shape[:-1], 1)
    return tied.gather(-1, where)[..., 0].to(scores) / tied.sum(-1)


def balanced(credits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean over classes of the share that is right, `[k, …]`: chance is one in `classes`."""
    hot = torch.nn.functional.one_hot(labels, classes).to(credits)
    counts = hot.sum(1).clamp(min=1)  # whole numbers until they are divided: all right is 1.0
    right = torch.einsum("k...n,knc->...kc", credits, hot)
    return (right / counts).mean(-1).movedim(-1, 0)
