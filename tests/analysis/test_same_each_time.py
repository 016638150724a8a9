"""What is random, or has another autograd state around it, gives no other numbers in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import (
    ablation_sweep,
    attribution_patching,
    direct_logit_attribution,
    edge_attribution,
    gradient_x_input,
    head_scores,
    integrated_gradients,
    logit_lens,
    steering_vector,
)
from tracekit.errors import InputError

IDS, OTHER = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
TOOLS: dict[str, Callable[[LanguageModel], Any]] = {
    "ablation_sweep": lambda model: ablation_sweep(model, IDS, first),
    "attribution_patching": lambda model: attribution_patching(model, IDS, OTHER, first),
    "direct_logit_attribution": lambda model: direct_logit_attribution(model, IDS, 5),
    "edge_attribution": lambda model: edge_attribution(model, IDS, OTHER, first),
    "gradient_x_input": lambda model: gradient_x_input(model, IDS, first),
    "head_scores": head_scores,
    "integrated_gradients": lambda model: integrated_gradients(model, IDS, first),
    "logit_lens": lambda model: logit_lens(model, IDS),
    "steering_vector": lambda model: steering_vector(model, IDS, OTHER),
}


def first(logits: Tensor) -> Tensor:
    return logits[:, 5]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(make("gpt2", resid_pdrop=0.5)[0])


@pytest.mark.parametrize("name", TOOLS)
def test_a_model_with_dropout_on_is_refused(model: LanguageModel, name: str) -> None:
    model.module.transformer.h[1].train()
    try:
        with pytest.raises(InputError, match=r"\(transformer.h.1\) is in training mode"):
            TOOLS[name](model)
    finally:
        model.module.eval()


@pytest.mark.parametrize("kind", ["gradient_x_input", "attribution_patching"])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_do_not_depend_on_the_state_around(
    model: LanguageModel, kind: str, around: Any
) -> None:
    plain = TOOLS[kind](model)
    with around():
        found = TOOLS[kind](model)
    torch.testing.assert_close(found.values, plain.values)


def test_a_way_is_integrated_under_inference_mode_too(model: LanguageModel) -> None:
    plain = integrated_gradients(model, IDS, first, steps=4).scores.values
    with torch.inference_mode():
        found = integrated_gradients(model, IDS, first, steps=4).scores.values
    torch.testing.assert_close(found, plain)
