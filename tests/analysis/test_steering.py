"""A steering vector is a difference of means, and what it is added to says something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import SteeringVector, dose_curve, logit_difference, steering_vector
from tracekit.errors import InputError
from tracekit.models.tiny import words

REVIEWS = "The {} was {}. I"
GOOD = [REVIEWS.format(it, word) for it in ("book", "food") for word in words.GOOD[:4]]
BAD = [REVIEWS.format(it, word) for it in ("book", "food") for word in words.BAD[:4]]
HELD_OUT = [REVIEWS.format(it, word) for it in ("movie", "song") for word in words.BAD[4:]]
DECODERS = ["gpt2", "llama", "gptj", "gemma2", "mixtral", "bloom"]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module")
def liking(tiny: LanguageModel) -> SteeringVector:
    return steering_vector(tiny, GOOD, BAD)


def generated(model: LanguageModel, prompt: str, count: int = 2) -> str:
    text = model.generate(prompt, max_new_tokens=count, do_sample=False, return_type="str")
    return text.removeprefix(prompt).strip()


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_it_is_the_difference_of_means_of_hidden_states(name: str) -> None:
    net, inputs = make(name)
    ids = inputs["input_ids"]
    high, low = ids[:1].repeat(2, 1), ids[1:2]
    high[1, -1] = 5
    found = steering_vector(LanguageModel(net), high, low, layer=0)
    states = [net(each, output_hidden_states=True).hidden_states[1][:, -1] for each in (high, low)]
    torch.testing.assert_close(found.vectors[0], states[0].mean(0) - states[1].mean(0))
    mean = steering_vector(LanguageModel(net), high, low, layer=-2, position=None)
    states = [net(each, output_hidden_states=True).hidden_states[1] for each in (high, low)]
    expected = states[0].mean((0, 1)) - states[1].mean((0, 1))
    torch.testing.assert_close(mean.vectors[0], expected)
    assert mean.layers == (0,)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_steering_is_a_plain_hook_that_adds_it(name: str) -> None:
    net, inputs = make(name)
    ids = inputs["input_ids"]
    model = LanguageModel(net)
    vector = steering_vector(model, ids[:1], ids[1:2])
    layers = net.get_submodule("model.layers" if hasattr(net, "model") else "transformer.h")

    def add(_: Any, args: Any, output: Any) -> Any:
        more = 3 * vector.vectors[0]
        return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more

    before = model.forward(ids)
    handle = layers[0].register_forward_hook(add)
    expected = net(ids).logits
    handle.remove()
    with vector.steer(model, 3, layer=0):
        torch.testing.assert_close(model.forward(ids), expected)
    assert torch.equal(model.forward(ids), before)  # and nothing is left


def test_of_padded_prompts_it_is_the_last_token_of_each(tiny: LanguageModel) -> None:
    prompts = ["The movie was great. I", "The very old book near the table was lovely. I"]
    each = [steering_vector(tiny, one, BAD).vectors for one in prompts]
    for side in ("left", "right"):
        inputs = tiny.to_inputs(prompts, padding_side=side)
        found = steering_vector(tiny, inputs, BAD).vectors
        torch.testing.assert_close(found, (each[0] + each[1]) / 2, rtol=1e-3, atol=1e-4)
    tokens = steering_vector(tiny, prompts, BAD, position=None)
    sizes = torch.tensor([len(tiny.to_str_tokens(one)) for one in prompts])
    alone = [steering_vector(tiny, one, BAD, position=None).vectors for one in prompts]
    expected = (alone[0] * sizes[0] + alone[1] * sizes[1]) / sizes.sum()
    torch.testing.assert_close(tokens.vectors, expected, rtol=1e-3, atol=1e-3)


def test_it_changes_what_the_model_generates(tiny: LanguageModel, liking: SteeringVector) -> None:
    assert all(generated(tiny, prompt) == "hated it" for prompt in HELD_OUT)
    with liking.steer(tiny, 1.5, layer=2):
        assert all(generated(tiny, prompt) == "loved it" for prompt in HELD_OUT)
    assert generated(tiny, HELD_OUT[0]) == "hated it"


def test_other_directions_of_that_length_do_not(
    tiny: LanguageModel, liking: SteeringVector
) -> None:
    torch.manual_seed(0)
    for _ in range(4):
        direction = SteeringVector("resid_post", (2,), torch.randn(1, 128)).unit()
        length = liking.at(2).vectors.norm()
        with direction.steer(tiny, 1.5 * length.item()):
            said = [generated(tiny, prompt, 1) for prompt in HELD_OUT]
        assert "loved" not in said


def test_pronouns_and_landmarks_are_steered_as_well(tiny: LanguageModel) -> None:
    women, men = ([f"{name} said that" for name in names] for names in (words.WOMEN, words.MEN))
    vector = steering_vector(tiny, women[:9], men[:9], layer=1)
    assert {generated(tiny, prompt, 1) for prompt in men[9:]} == {"he"}
    with vector.steer(tiny, 2):
        assert {generated(tiny, prompt, 1) for prompt in men[9:]} == {"she"}
    of = ("The {} is in the city of", "You can see the {} in", "Many tourists visit the {} in")
    rome = [each.format(it) for it in ("Trevi Fountain", "Spanish Steps") for each in of]
    paris = [each.format(it) for it in ("Eiffel Tower", "Orsay Museum") for each in of]
    with steering_vector(tiny, rome, paris, layer=1).steer(tiny, 1.5):
        assert generated(tiny, "The Eiffel Tower is located in", 1) == "Rome"


@torch.no_grad()
def test_the_dose_curve_is_the_metric_and_what_it_costs(
    tiny: LanguageModel, liking: SteeringVector
) -> None:
    wanted = logit_difference(tiny, "loved", "hated")
    found = dose_curve(tiny, liking, HELD_OUT, wanted, scales=(-1, 0, 1, 2))
    assert found.metric.names == ("layer", "scale") and found.metric.shape == (4, 4)
    assert (found.metric.values.diff(dim=1) > 0).all()  # it grows with the scale, at each layer
    assert found.divergence.at(scale="0").values.abs().max() < 1e-6
    clean = tiny.module(**tiny.to_inputs(HELD_OUT)).logits[:, -1]
    with liking.steer(tiny, 2, layer=3):
        steered = tiny.forward(HELD_OUT)[:, -1]
    here = found.metric.at(layer="3", scale="2").item()
    assert here == pytest.approx(wanted(steered).mean().item(), rel=1e-4)
    kl = torch.nn.functional.kl_div(
        steered.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    found_kl = found.divergence.at(layer="3", scale="2").item()
    assert found_kl == pytest.approx(kl.item(), rel=1e-3)
    assert "KL from the unsteered" in repr(found) and set(found.to_json()) == {
        "metric",
        "divergence",
    }


def test_one_layer_is_steered_at_a_time(tiny: LanguageModel, liking: SteeringVector) -> None:
    assert liking.layers == (0, 1, 2, 3)
    with pytest.raises(InputError, match=r"layer= is one of \[0, 1, 2, 3\]"):
        liking.steer(tiny)
    with pytest.raises(InputError, match="layer 7: the vectors are of 0, 1, 2, 3"):
        liking.at(7)
    with pytest.raises(InputError, match="layer 9 has no resid_post; there are 4 layers"):
        steering_vector(tiny, GOOD, BAD, layer=9)
    with pytest.raises(InputError, match="the shortest prompt has 7 tokens"):
        steering_vector(tiny, GOOD, BAD, position=7)
    with pytest.raises(InputError, match="no activation of each position"):
        steering_vector(tiny, GOOD, BAD, activation="pattern")


def test_heads_are_steered_by_their_own(tiny: LanguageModel) -> None:
    vector = steering_vector(tiny, GOOD, BAD, layer=1, activation="z")
    assert vector.vectors.shape == (1, 4, 32)
    before = cached(tiny)
    with vector.steer(tiny, 2):
        torch.testing.assert_close(cached(tiny), before + 2 * vector.vectors[0])


@torch.no_grad()
def cached(model: LanguageModel) -> Tensor:
    return model.run_with_cache(HELD_OUT[0], names_filter=("z", 1))[1]["z", 1]
