"""Scores of heads are read off Hugging Face's own attentions; induction heads copy."""

from __future__ import annotations

import random

import pytest
import torch

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import HeadScores, ablate, copying_scores, head_scores, repeated_tokens
from tracekit.errors import InputError, MissingNameError

LENGTH = 6


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module")
def scores(tiny: LanguageModel) -> HeadScores:
    return head_scores(tiny)


def test_random_tokens_come_twice_behind_the_beginning(tiny: LanguageModel) -> None:
    tokens = repeated_tokens(tiny, 20, rows=4, seed=3)
    assert tokens.shape == (4, 41) and (tokens[:, 0] == tiny.tokenizer.bos_token_id).all()
    assert torch.equal(tokens[:, 1:21], tokens[:, 21:])
    assert all(len(set(row.tolist())) == 20 for row in tokens[:, 1:21])
    assert not {*tokens[:, 1:].flatten().tolist()} & {*tiny.tokenizer.all_special_ids}
    assert torch.equal(tokens, repeated_tokens(tiny, 20, rows=4, seed=3))
    assert not torch.equal(tokens, repeated_tokens(tiny, 20, rows=4, seed=4))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mixtral", "bloom"])
@torch.no_grad()
def test_scores_are_means_over_the_models_own_attentions(name: str) -> None:
    net, _ = make(name, attn="eager")
    for weight in net.parameters():
        weight.mul_(3)  # patterns that are not all alike
    model = LanguageModel(net)
    found = head_scores(model, LENGTH, rows=2)
    tokens = repeated_tokens(model, LENGTH, rows=2)
    attentions = net(tokens, output_attentions=True).attentions
    for layer, pattern in enumerate(attentions):
        for head in range(pattern.shape[1]):

            def mean(back: int, first: int, each: torch.Tensor = pattern[:, head]) -> float:
                at = range(first, 2 * LENGTH)
                return sum(each[row, i, i - back].item() for row in range(2) for i in at) / (
                    2 * len(at)
                )

            expected = (mean(LENGTH - 1, LENGTH), mean(1, 1), mean(LENGTH, LENGTH))
            kinds = (found.induction, found.previous_token, found.duplicate_token)
            for kind, value in zip(kinds, expected, strict=True):
                assert kind.at(layer=layer, head=head).item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_copying_is_of_the_eigenvalues_of_the_whole_circuit(name: str) -> None:
    net, _ = make(name)
    model = LanguageModel(net)
    found = copying_scores(model)
    for layer, head in ((0, 1), (1, 3)):
        whole = model.W_E.double() @ model.layers[layer].OV[head].AB.double() @ model.W_U.double()
        values = torch.linalg.eigvals(whole)
        expected = float(values.real.sum() / values.abs().sum())
        assert found.at(layer=layer, head=head).item() == pytest.approx(expected, abs=1e-3)


def test_the_heads_of_the_packaged_model_are_found(scores: HeadScores) -> None:
    assert sorted(scores.heads("induction")) == [(2, 0), (2, 1), (2, 2), (2, 3)]
    assert scores.heads("previous_token") == [(0, 3)]
    assert scores.heads("duplicate_token") == []
    assert scores.copied > 0.99
    assert "100% of a second copy foretold" in repr(scores)
    assert set(scores.to_json()) == {"induction", "previous_token", "duplicate_token", "copied"}
    with pytest.raises(InputError, match="'copy' is no kind of head"):
        scores.heads("copy")


def test_ablating_induction_heads_ends_copying_and_as_many_others_do_not(
    tiny: LanguageModel, scores: HeadScores
) -> None:
    tokens = repeated_tokens(tiny, 20, rows=8, seed=1)

    @torch.no_grad()
    def copied(heads: list[tuple[int, int]]) -> float:
        with ablate(tiny, [("z", *head) for head in heads], how="mean", reference=tokens):
            says = tiny.forward(tokens)[:, 21:-1].argmax(-1)
        return (says == tokens[:, 22:]).float().mean().item()

    every = [(layer, head) for layer in range(4) for head in range(4)]
    induction = scores.heads("induction")
    assert copied(induction) < 0.02
    circuit = {*induction, *scores.heads("previous_token")}  # they read what that one writes
    others = [each for each in every if each not in circuit]
    for seed in range(4):
        assert copied(random.Random(seed).sample(others, len(induction))) > 0.95
    assert copied(scores.heads("previous_token")) < 0.5


def test_what_has_no_attention_is_refused() -> None:
    net, _ = make("mamba")
    with pytest.raises(MissingNameError, match="pattern"):
        head_scores(LanguageModel(net))
    net, _ = make("gpt2")
    with pytest.raises(InputError, match="length= is from 2 to"):
        head_scores(LanguageModel(net), length=1000)
