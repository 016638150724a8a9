"""What a newcomer gets wrong is an error that says what to write; what answers is plain data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tracekit import LanguageModel
from tracekit.analysis import (
    Patch,
    ablation_sweep,
    attribution_patching,
    copying_scores,
    direct_logit_attribution,
    dose_curve,
    gradient_x_input,
    head_scores,
    integrated_gradients,
    log_probability,
    logit,
    logit_difference,
    logit_lens,
    patch_sweep,
    probability,
    steering_vector,
)
from tracekit.errors import InputError

CLEAN, CORRUPTED = "The capital of France is", "The capital of Italy is"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.mark.parametrize(
    "tool",
    [
        lambda bare: patch_sweep(bare, CLEAN, CORRUPTED, torch.sum),
        lambda bare: logit_lens(bare, CLEAN),
        lambda bare: gradient_x_input(bare, CLEAN, torch.sum),
        lambda bare: steering_vector(bare, "good", "bad"),
        lambda bare: logit(bare, "Paris"),
        head_scores,
        copying_scores,
    ],
)
def test_a_module_that_was_not_wrapped_is_named(
    model: LanguageModel, tool: Callable[[Any], object]
) -> None:
    with pytest.raises(InputError, match="LanguageModel, not GPT2LMHeadModel: give LanguageModel"):
        tool(model.module)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": 2}, r"layers= is a list, as in layers=\[2\]"),
        ({"positions": ["France"]}, "positions are counted: give numbers.*not 'France'"),
        ({"positions": "France"}, "positions= are numbers.*or 'all'; not 'France'"),
        ({"patches": ["z"]}, r"patches= are Patch\('z', layer=3\), not 'z'"),
        ({"patches": [Patch("z", layer="3")]}, "layers are counted.*not '3'"),  # pyright: ignore[reportArgumentType] - the mistake
    ],
)
def test_places_of_another_kind_are_refused(
    model: LanguageModel, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        patch_sweep(model, CLEAN, CORRUPTED, logit(model, "Paris"), **options)


def test_one_name_is_no_tuple_of_axes(model: LanguageModel) -> None:
    metric = logit(model, "Paris")
    for tool in (gradient_x_input, ablation_sweep):
        with pytest.raises(InputError, match=r"over= is a tuple of axes.*not 'layer'"):
            tool(model, CLEAN, metric, over="layer")
    with pytest.raises(InputError, match=r"over= is a tuple of axes.*not 'layer'"):
        attribution_patching(model, CLEAN, CORRUPTED, metric, over="layer")


def test_a_metric_of_all_positions_or_that_is_none_is_told_what_it_is_given(
    model: LanguageModel,
) -> None:
    with pytest.raises(InputError, match=r"too many indices.*\[1, 356\].*logits\[:, token\]"):
        patch_sweep(model, CLEAN, CORRUPTED, lambda logits: logits[:, -1, 5])
    vector = steering_vector(model, "good", "bad", layer=1)
    with pytest.raises(InputError, match=r"a metric is a function of logits.*not 'Paris'"):
        dose_curve(model, vector, CLEAN, "Paris")  # pyright: ignore[reportArgumentType] - the mistake


def test_tokens_that_are_none_are_refused(model: LanguageModel) -> None:
    metric = logit(model, 356)
    with pytest.raises(InputError, match="token 356: the model's logits are of 356 tokens, from 0"):
        metric(torch.zeros(1, 356))
    with pytest.raises(InputError, match=r"its text or its number.*not Metric"):
        direct_logit_attribution(model, CLEAN, metric)  # pyright: ignore[reportArgumentType] - the mistake


def test_counts_that_are_too_small_and_baselines_that_are_misspelled_are_refused(
    model: LanguageModel,
) -> None:
    with pytest.raises(InputError, match="top= is at least 1"):
        logit_lens(model, CLEAN, top=0)
    with pytest.raises(InputError, match="rows= is at least 1"):
        head_scores(model, rows=0)
    with pytest.raises(InputError, match="or 'zero', 'pad' or 'mean'"):
        integrated_gradients(model, CLEAN, logit(model, "Paris"), baseline="zeros")


def test_metrics_go_to_other_processes_and_read_well(model: LanguageModel) -> None:
    logits = torch.randn(1, 356)
    for metric in (
        *(of(model, "Paris") for of in (logit, probability, log_probability)),
        logit_difference(model, "Paris", "Rome"),
    ):
        again = pickle.loads(pickle.dumps(metric))
        assert torch.equal(again(logits), metric(logits))
        assert repr(metric) == f"Metric(name={metric.name!r})"


def test_a_steering_vector_is_json(model: LanguageModel) -> None:
    vector = steering_vector(model, "good", "bad", layer=[1, 2])
    told = json.loads(json.dumps(vector.to_json()))
    assert (told["activation"], told["layers"]) == ("resid_post", [1, 2])
    assert torch.tensor(told["vectors"]).equal(vector.vectors)


def test_runs_that_are_the_same_are_no_pair(model: LanguageModel) -> None:
    text = "The Eiffel Tower is in"
    for tool in (patch_sweep, attribution_patching):
        with pytest.raises(InputError, match="are the same: no patch changes anything"):
            tool(model, text, text, logit(model, "Paris"))
