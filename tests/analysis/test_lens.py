"""The logit lens says what the model's own head makes of Hugging Face's own hidden states."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import Lens, logit_lens
from tracekit.errors import InputError, MissingNameError, UnsupportedError

TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module")
def lens(tiny: LanguageModel) -> Lens:
    return logit_lens(tiny, TEXT)


def told(logits: Tensor) -> Tensor:
    return logits[0].float().softmax(-1)


def of_one(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in inputs.items()}


DECODERS = ["gpt2", "gptj", "bloom", "llama", "gemma2", "cohere2", "mixtral", "mamba", "opt"]
OTHERS = ["t5", "bart", "bert"]


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
@torch.no_grad()
def test_the_last_layer_says_what_the_model_says(name: str) -> None:
    net, inputs = make(name)
    found = logit_lens(LanguageModel(net), of_one(inputs), top=128)
    own = told(net(**of_one(inputs)).logits)
    says = torch.zeros_like(own).scatter(-1, found.ids[-1], found.top.values[-1])
    torch.testing.assert_close(says, own, rtol=1e-5, atol=1e-7)
    assert found.divergence.values[-1].abs().max() < 1e-6


@torch.no_grad()
def test_of_the_last_layer_the_numbers_are_the_very_same(tiny: LanguageModel, lens: Lens) -> None:
    logits = tiny.module(**tiny.to_inputs(TEXT)).logits[0]
    best = logits.log_softmax(-1).topk(5)
    assert torch.equal(lens.ids[-1], best.indices)
    assert torch.equal(lens.top.values[-1], best.values.exp())


@pytest.mark.parametrize(
    ("name", "norm", "head"),
    [
        ("gpt2", "transformer.ln_f", "lm_head"),
        ("llama", "model.norm", "lm_head"),
        ("gemma2", "model.norm", "lm_head"),
        ("bloom", "transformer.ln_f", "lm_head"),
    ],
)
@torch.no_grad()
def test_an_earlier_layer_says_what_the_head_makes_of_its_hidden_state(
    name: str, norm: str, head: str
) -> None:
    net, inputs = make(name)
    one = of_one(inputs)
    found = logit_lens(LanguageModel(net), one, token=7)
    states = net(**one, output_hidden_states=True).hidden_states
    cap = getattr(net.config, "final_logit_softcapping", None)
    for layer, state in enumerate(states[:-1]):  # the last one is normed
        logits = net.get_submodule(head)(net.get_submodule(norm)(state))
        says = told(logits if cap is None else cap * torch.tanh(logits / cap))
        torch.testing.assert_close(found.top.values[layer], says.topk(5).values)
        torch.testing.assert_close(found.probability.values[layer], says[:, 7])
        assert found.rank.values[layer].tolist() == (says > says[:, 7:8]).sum(-1).tolist()
        torch.testing.assert_close(found.entropy.values[layer], -(says * says.log()).sum(-1))


def test_it_tells_when_the_fact_emerges(tiny: LanguageModel, lens: Lens) -> None:
    assert set(lens.chosen) == {"Paris"}
    ranks = lens.rank.at(position="of").values
    assert lens.layers == ("embed", "0", "1", "2", "3")
    assert ranks[0] > 50 and ranks[-1] == 0
    assert lens.probability.at(position=-1, layer="3").item() > 0.9
    assert lens.words[-1][-1][0] == "Paris"
    text = repr(lens)
    assert "rank of 'Paris'" in text and "Paris 100%" in text.splitlines()[-1]
    plain = json.loads(json.dumps(lens.to_json()))
    assert plain["says"][-1][-1][0]["token"] == "Paris"
    assert plain["rank"][-1][-1] == 0


def test_a_token_can_be_followed_at_each_position(tiny: LanguageModel) -> None:
    words = tiny.to_str_tokens(TEXT)
    found = logit_lens(tiny, TEXT, [*words[1:], "Paris"])
    assert found.chosen == (*words[1:], "Paris")
    with pytest.raises(InputError, match="one for each of 9 positions, not 2"):
        logit_lens(tiny, TEXT, ["Paris", "Rome"])


def test_other_points_of_the_stream_are_read_alike(tiny: LanguageModel, lens: Lens) -> None:
    before = logit_lens(tiny, TEXT, activation="resid_pre")
    assert before.layers == ("0", "1", "2", "3", "final")
    torch.testing.assert_close(before.top.values, lens.top.values)
    middle = logit_lens(tiny, TEXT, activation="resid_mid")
    assert middle.layers == ("0", "1", "2", "3", "final")
    assert not torch.allclose(middle.top.values[:-1], lens.top.values[:-1])


def test_what_edits_make_of_the_stream_is_what_is_read(tiny: LanguageModel) -> None:
    with tiny.edit() as steered:
        steered.layers[1].resid_post[:, -1] = 0
    found = logit_lens(steered, TEXT)
    own = told(steered.forward(TEXT)).topk(5).values
    torch.testing.assert_close(found.top.values[-1], own)
    assert found.probability.values[2, -1] != logit_lens(tiny, TEXT).probability.values[2, -1]


def test_several_prompts_are_refused(tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="logit_lens is of one prompt, and 2 were given"):
        logit_lens(tiny, [TEXT, "The"])


def test_what_has_no_lens_is_refused() -> None:
    net, inputs = make("albert")
    with pytest.raises(UnsupportedError, match="what it would make of an earlier one is not known"):
        logit_lens(LanguageModel(net), of_one(inputs))
    net, inputs = make("gptj")
    with pytest.raises(MissingNameError, match="resid_mid"):
        logit_lens(LanguageModel(net), of_one(inputs), activation="resid_mid")
