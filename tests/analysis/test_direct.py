"""What components add to a difference of logits adds up to it."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import direct_logit_attribution
from tracekit.errors import InputError


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mixtral", "bloom", "mamba"])
@torch.no_grad()
def test_components_add_up_to_the_difference_of_logits(name: str) -> None:
    net, inputs = make(name)
    for weight in net.parameters():
        weight.add_(torch.randn_like(weight) / 10)  # biases are made as zeros
    ids = inputs["input_ids"]
    found = direct_logit_attribution(LanguageModel(net), ids, 7, 9)
    seen: list[torch.Tensor] = []
    head = net.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, output: seen.append(output))
    net(ids)
    handle.remove()
    difference = (seen[0][:, -1, 7] - seen[0][:, -1, 9]).mean()
    torch.testing.assert_close(found.values.sum(), difference, rtol=1e-4, atol=1e-4)


def test_several_prompts_are_the_mean_at_the_last_token_of_each() -> None:
    model = LanguageModel("tracekit/tiny")
    prompts = ["The Eiffel Tower is in the city of", "Many tourists visit the Trevi Fountain in"]
    right, wrong = ["Paris", "Rome"], ["Rome", "Paris"]
    for by in ("component", "head"):
        each = [
            direct_logit_attribution(model, prompt, *tokens, by=by)
            for prompt, *tokens in zip(prompts, right, wrong, strict=True)
        ]
        for side in ("left", "right"):
            inputs = model.to_inputs(prompts, padding_side=side)
            found = direct_logit_attribution(model, inputs, right, wrong, by=by)
            mean = (each[0].values + each[1].values) / 2
            torch.testing.assert_close(found.values, mean, rtol=1e-3, atol=1e-4)
    assert found.names == ("layer", "head") and found.shape == (4, 4)
    with pytest.raises(InputError, match="by= is 'component' or 'head'"):
        direct_logit_attribution(model, prompts, "Paris", by="neuron")
    with pytest.raises(InputError, match="3 tokens for 2 prompts"):
        direct_logit_attribution(model, prompts, ["Paris", "Rome", "Berlin"])
