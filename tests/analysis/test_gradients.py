"""Gradient x input and integrated gradients are those of plain autograd on the bare model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import gradient_x_input, integrated_gradients, logit_difference
from tracekit.analysis.integrated import nodes
from tracekit.errors import GradientError, InputError

TEXT = "The Eiffel Tower is in the city of"
OTHER = "The Trevi Fountain is in the city of"
FAMILIES = ["gpt2", "llama", "gptj", "gemma2", "mixtral", "bloom"]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def metric(logits: Tensor) -> Tensor:
    return logits[:, 7] - 2 * logits[:, 9]


def of_bare(net: Any, embeddings: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """The metric of the bare model on embeddings, for each row, and its gradient there."""
    leaf = embeddings.detach().requires_grad_()
    found = metric(net(inputs_embeds=leaf, **more).logits[:, -1])
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_of_embeddings_it_is_what_autograd_gives_on_the_bare_model(name: str) -> None:
    net, inputs = make(name)
    ids = inputs["input_ids"][:1]
    embeddings = net.get_input_embeddings()(ids).detach()
    _, gradient = of_bare(net, embeddings)
    found = gradient_x_input(LanguageModel(net), ids, metric)
    assert found.names == ("position",)
    torch.testing.assert_close(found.values, (embeddings * gradient).sum(-1)[0])
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_along_the_way_it_is_a_plain_loop_of_backward_passes(name: str) -> None:
    net, inputs = make(name)
    ids = inputs["input_ids"][:1]
    embed = net.get_input_embeddings()
    end = embed(ids).detach()
    every = embed(torch.arange(len(embed.weight))).detach()  # some scale what they give
    begin = every.mean(0).expand_as(end)
    points, weights = np.polynomial.legendre.leggauss(6)
    total = torch.zeros_like(end)
    for point, weight in zip(points, weights, strict=True):
        _, gradient = of_bare(net, begin + (point + 1) / 2 * (end - begin))
        total += weight / 2 * gradient
    found = integrated_gradients(LanguageModel(net), ids, metric, baseline="mean", steps=6)
    expected = (total * (end - begin)).sum(-1)[0]
    torch.testing.assert_close(found.scores.values, expected, rtol=1e-4, atol=1e-5)
    assert found.value == pytest.approx(of_bare(net, end)[0].item(), rel=1e-4)
    assert found.baseline == pytest.approx(of_bare(net, begin)[0].item(), rel=1e-4)
    difference = float(expected.sum()) - (found.value - found.baseline)
    assert found.error == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 64])
def test_the_points_are_those_of_gauss_and_legendre(count: int) -> None:
    points, weights = nodes(count)
    expected, expected_weights = np.polynomial.legendre.leggauss(count)
    np.testing.assert_allclose(points.numpy() * 2 - 1, expected, atol=1e-12)
    np.testing.assert_allclose(weights.numpy() * 2, expected_weights, atol=1e-12)
    for degree in (0, 1, 2 * count - 1):
        assert float((weights * points**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-9)


def test_the_scores_are_complete_and_the_error_is_told(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = integrated_gradients(tiny, TEXT, wanted, steps=64)
    few = integrated_gradients(tiny, TEXT, wanted, steps=4)
    assert abs(found.error) < 1e-3 < abs(few.error)
    assert "64 steps" in repr(found) and found.to_json()["steps"] == 64
    other = integrated_gradients(tiny, TEXT, wanted, baseline=OTHER)
    scores = dict(zip(other.scores.labels("position"), other.scores.values.tolist(), strict=True))
    assert [word for word, score in scores.items() if score] == ["Eiffel", "Tower"]
    assert abs(other.error) < 1e-3


def test_few_rows_at_a_time_give_the_same(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    whole = integrated_gradients(tiny, TEXT, wanted, steps=5)
    one = integrated_gradients(tiny, TEXT, wanted, steps=5, memory=1)
    torch.testing.assert_close(one.scores.values, whole.scores.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "axes"), [("z", ("position", "head")), ("mlp_post", ("position",))]
)
def test_activations_inside_are_integrated_as_well(
    tiny: LanguageModel, name: str, axes: tuple[str, ...]
) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = integrated_gradients(tiny, TEXT, wanted, activation=name, layer=1)
    assert found.scores.names == axes and abs(found.error) < 1e-3
    with pytest.raises(InputError, match="name one, layer="):
        integrated_gradients(tiny, TEXT, wanted, activation=name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_of_the_stream_it_is_what_a_plain_hook_gives(name: str) -> None:
    net, inputs = make(name)
    ids = inputs["input_ids"]
    layers = net.transformer.h if name == "gpt2" else net.model.layers
    seen: list[Tensor] = []
    handle = layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    logits = net(ids).logits[:, -1]
    handle.remove()
    (gradient,) = torch.autograd.grad(metric(logits).sum(), seen[0])
    found = gradient_x_input(LanguageModel(net), ids, metric, activation="resid_pre")
    expected = (seen[0].detach() * gradient).sum(-1).mean(0)  # over prompts
    torch.testing.assert_close(found.at(layer="1").values, expected)


def test_heads_of_padded_prompts_are_those_of_each_alone(tiny: LanguageModel) -> None:
    prompts = [TEXT, "Many tourists visit the Trevi Fountain in"]
    wanted = logit_difference(tiny, "Paris", "Rome")
    each = [
        gradient_x_input(tiny, one, wanted, activation="z", over=("layer", "head")).values
        for one in prompts
    ]
    axes = ("prompt", "layer", "head")
    found = gradient_x_input(tiny, prompts, wanted, activation="z", over=axes)
    torch.testing.assert_close(found.values, torch.stack(each), rtol=1e-3, atol=1e-5)
    mean = gradient_x_input(tiny, prompts, wanted, activation="z", over=("layer", "head"))
    torch.testing.assert_close(mean.values, found.values.mean(0))
    with pytest.raises(InputError, match="these prompts are of different lengths"):
        gradient_x_input(tiny, prompts, wanted)


def test_masked_scores_count_for_nothing(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = gradient_x_input(tiny, TEXT, wanted, activation="scores")
    assert found.names == ("layer", "position", "head", "key")
    assert found.values.isfinite().all() and found.values.any()


def test_what_can_not_be_is_refused(tiny: LanguageModel) -> None:
    with pytest.raises(GradientError, match="the metric has no gradient"):
        gradient_x_input(tiny, TEXT, lambda logits: logits.argmax(-1).float())
    with pytest.raises(InputError, match="is no standard activation; did you mean 'resid_post'"):
        gradient_x_input(tiny, TEXT, metric, activation="resid_pots")
    with pytest.raises(InputError, match="embed_out has the axes prompt, position, feature"):
        gradient_x_input(tiny, TEXT, metric, over=("head",))
    with pytest.raises(InputError, match="a prompt of 4 tokens, and the input has 9"):
        integrated_gradients(tiny, TEXT, metric, baseline="The Trevi Fountain")
    with pytest.raises(InputError, match="is of token embeddings"):
        integrated_gradients(tiny, TEXT, metric, baseline="pad", activation="z", layer=0)
