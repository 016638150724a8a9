"""Probes find what activations tell, are tested on prompts unseen, and are told from chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import Probes, probe
from tracekit.analysis.fitting import balanced, credits_of, fit
from tracekit.errors import InputError
from tracekit.models.tiny import words

REVIEWS = [
    (f"The {it} was {word}. I", kind)
    for it in words.REVIEWED[:4]
    for kind, adjectives in (("good", words.GOOD[:5]), ("bad", words.BAD[:5]))
    for word in adjectives
]
TEXTS = [text for text, _ in REVIEWS]
KINDS = [kind for _, kind in REVIEWS]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module")
def found(tiny: LanguageModel) -> Probes:
    return probe(tiny, TEXTS, KINDS, method="means")


def samples() -> tuple[Tensor, Tensor]:
    """Two clouds that overlap, one of them larger: `[n, 1, d]`, and labels."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 45 + [1] * 15)
    x = torch.randn(60, 1, 4, generator=draw) * torch.tensor([1.0, 5.0, 0.2, 1.0])
    x[:, 0, 1] += 4.0 * labels
    x[:, 0, 3] = 7.0  # tells nothing
    return x, labels


def test_the_logistic_probe_is_the_minimum_of_its_loss() -> None:
    x, labels = samples()
    train = torch.ones(2, 60, dtype=torch.bool)
    train[1, ::5] = False
    flipped = 1 - labels
    both = torch.stack([labels, flipped])
    probes = fit(x, both, train, 2, "logistic", 0.01)
    spread = (x[:, 0] - x[:, 0].mean(0)).square().mean(0).sqrt()
    for fold in range(2):
        for which, own in enumerate(both):
            weight = (probes.weight[which, fold, 0] * spread).requires_grad_()
            bias = probes.bias[which, fold, 0].requires_grad_()
            seen = train[fold]
            counts = own[seen].bincount()
            shares = 1 / (2 * counts[own[seen]])  # each class as much as the other
            scaled = x[seen, 0] / torch.where(spread > 0, spread, 1.0)
            losses = torch.nn.functional.cross_entropy(
                scaled @ weight.T + bias, own[seen], reduction="none"
            )
            loss = (losses * shares).sum() + 0.005 * weight.square().sum()
            slope_of_weight, slope = torch.autograd.grad(loss, (weight, bias))
            assert slope.abs().max() < 1e-4
            assert slope_of_weight[:, :3].abs().max() < 1e-3
    assert not probes.weight[..., 3].any()
    torch.testing.assert_close(probes.scores(x)[0], probes.scores(x)[1].flip(-1), atol=1e-2, rtol=0)


def test_the_nearest_mean_is_the_nearest_mean() -> None:
    x, labels = samples()
    train = torch.ones(1, 60, dtype=torch.bool)
    train[0, ::4] = False
    probes = fit(x, labels[None], train, 2, "means", 0.0)
    spread = (x[:, 0] - x[:, 0].mean(0)).square().mean(0).sqrt()
    scaled = x[:, 0, :3] / spread[:3]
    means = [scaled[train[0] & (labels == each)].mean(0) for each in range(2)]
    nearest = torch.stack([(scaled - mean).norm(dim=1) for mean in means]).argmin(0)
    assert torch.equal(probes.scores(x)[0, 0, 0].argmax(-1), nearest)


def test_chance_is_one_in_so_many_whatever_the_shares_and_ties_are_shared() -> None:
    labels = torch.tensor([[0] * 9 + [1]])
    always = torch.zeros(1, 10, 2)
    always[..., 0] = 1
    assert balanced(credits_of(always, labels), labels, 2).item() == pytest.approx(0.5)
    nothing = torch.zeros(1, 10, 2)
    assert credits_of(nothing, labels).eq(0.5).all()


def test_sentiment_is_told_from_its_word_on(found: Probes) -> None:
    assert found.accuracy.names == ("layer", "position")
    assert (found.accuracy.at(position=slice(4, None)).values > 0.95).all()
    assert (found.accuracy.at(position=slice(0, 2)).values - 0.5).abs().max() < 0.1
    assert (found.control.values < 0.75).all()
    assert found.selectivity.at(layer=2, position=-1).item() > 0.3
    assert "best at layer" in repr(found) and set(found.to_json()) == {
        "classes",
        "accuracy",
        "control",
    }


@torch.no_grad()
def test_accuracy_is_that_of_a_loop_over_the_folds(tiny: LanguageModel, found: Probes) -> None:
    _, cache = tiny.run_with_cache(TEXTS, names_filter=("resid_post", 1))
    for position in (3, 5):
        x = cache["resid_post", 1][:, position]
        x = (x - x.mean(0)) / (x - x.mean(0)).square().mean(0).sqrt()
        own = torch.tensor([found.classes.index(kind) for kind in KINDS])
        right = torch.zeros(len(own))
        for fold in found.folds.unique():
            seen = found.folds != fold
            means = torch.stack([x[seen & (own == each)].mean(0) for each in range(2)])
            distances = torch.cdist(x[~seen], means)
            right[~seen] = (distances.argmin(1) == own[~seen]).float()
        expected = (right[own == 0].mean() + right[own == 1].mean()) / 2
        assert found.accuracy.at(layer=1, position=position).item() == pytest.approx(
            expected.item(), abs=0.06
        )
    assert [int((found.folds == fold).sum()) for fold in range(5)] == [8] * 5


def test_a_logistic_probe_of_prompts_of_other_lengths(tiny: LanguageModel) -> None:
    names = [*words.WOMEN[:8], *words.MEN[:8]]
    texts = [
        f"{name} said that" if at % 2 else f"The {name} said that" for at, name in enumerate(names)
    ]
    kinds = [name in words.WOMEN for name in names]
    result = probe(tiny, texts, kinds, positions=[0, -1], folds=4, controls=1)
    assert result.classes == (False, True) and result.accuracy.labels("position") == ("0", "-1")
    assert (result.accuracy.at(position="-1").values > 0.9).all()
    assert (result.accuracy.at(position="0").values - 0.5).abs().max() < 1e-6
    assert result.direction(layer=1).shape == (128,)
    with pytest.raises(InputError, match="these prompts are of different lengths"):
        probe(tiny, texts, kinds)


@torch.no_grad()
def test_its_direction_is_the_difference_of_means(tiny: LanguageModel, found: Probes) -> None:
    _, cache = tiny.run_with_cache(TEXTS, names_filter=("resid_post", 2))
    x = cache["resid_post", 2][:, -1]
    is_good = torch.tensor([kind == "good" for kind in KINDS])
    difference = x[is_good].mean(0) - x[~is_good].mean(0)
    variance = (x - x.mean(0)).square().mean(0)
    torch.testing.assert_close(
        found.direction(layer=2), difference / variance, rtol=1e-2, atol=1e-3
    )


def test_the_same_prompt_is_never_on_both_sides(tiny: LanguageModel) -> None:
    texts, kinds = TEXTS[:10] * 3, KINDS[:10] * 3
    result = probe(tiny, texts, kinds, method="means", positions=[-1], controls=1)
    assert torch.equal(result.folds[:10], result.folds[10:20])
    assert len(result.folds.unique()) == 5


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bloom"])
def test_few_prompts_at_a_time_give_the_same(name: str) -> None:
    net, _ = make(name)
    model = LanguageModel(net)
    ids = torch.randint(0, 100, (12, 4), generator=torch.Generator().manual_seed(0))
    labels = [int(row[1] > 50) for row in ids]
    options = {"method": "means", "controls": 1, "folds": 2}
    whole = probe(model, ids, labels, **options)
    parts = probe(model, ids, labels, memory=1, **options)
    torch.testing.assert_close(parts.accuracy.values, whole.accuracy.values)
    torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-3, atol=1e-3)


def test_what_can_not_be_told_apart_is_refused(tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="all labels are 1: a probe tells two classes apart"):
        probe(tiny, TEXTS, [1] * len(TEXTS))
    with pytest.raises(InputError, match="3 labels for 40 prompts"):
        probe(tiny, TEXTS, [1, 0, 1])
    with pytest.raises(InputError, match="two different prompts or more"):
        probe(tiny, TEXTS, [1, *[0] * (len(TEXTS) - 1)])
    with pytest.raises(InputError, match="method= is 'logistic' or 'means'"):
        probe(tiny, TEXTS, KINDS, method="svm")
    with pytest.raises(InputError, match="position 9: the shortest prompt has 7 tokens"):
        probe(tiny, TEXTS, KINDS, positions=[9])
