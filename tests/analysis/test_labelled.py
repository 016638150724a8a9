"""Labelled numbers are taken by number, by label and by stretch; metrics read last logits."""

from __future__ import annotations

import json

import pytest
import torch

from tracekit import LanguageModel
from tracekit.analysis import (
    Axis,
    Labelled,
    log_probability,
    logit,
    logit_difference,
    probability,
)
from tracekit.analysis.metrics import measured
from tracekit.errors import InputError

LAYERS = Axis("layer", ("0", "1"))
WORDS = Axis("position", ("The", "Tower", "The"))


@pytest.fixture
def found() -> Labelled:
    return Labelled(torch.tensor([[1.0, -5.0, 0.5], [2.0, 3.0, float("nan")]]), [LAYERS, WORDS])


def test_places_are_taken_by_number_label_and_stretch(found: Labelled) -> None:
    assert found.at(layer=1, position="Tower").item() == 3.0
    assert found.at(layer=-2).values.tolist() == [1.0, -5.0, 0.5]
    part = found.at(position=slice(1, None))
    assert part.shape == (2, 2) and part.labels("position") == ("Tower", "The")
    assert found.mean("layer").at(position=1).item() == -1.0


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({"layers": 1}, "'layers' is no axis; there are layer, position; did you mean 'layer'"),
        ({"position": "Towers"}, "no position has that label; did you mean 'Tower'"),
        ({"position": "The"}, r"is at \[0, 2\]: give the number of one"),
        ({"layer": 2}, "layer=2: there are 2"),
    ],
)
def test_what_is_not_there_is_said(found: Labelled, places: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        found.at(**places)


def test_the_largest_by_size_come_first_and_what_is_no_number_never(found: Labelled) -> None:
    cells = found.top(9)
    assert [cell.value for cell in cells] == [-5.0, 3.0, 2.0, 1.0, 0.5]
    assert cells[0].place == (0, 1) and cells[0].labels == ("0", "Tower")


def test_json_is_json_also_where_there_is_no_number(found: Labelled) -> None:
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["values"][1] == [2.0, 3.0, None]
    assert again["axes"][1] == {"name": "position", "labels": ["The", "Tower", "The"]}


def test_its_text_is_a_table(found: Labelled) -> None:
    text = repr(found)
    assert "layer 2, position 3" in text and "Tower" in text and "-5" in text


def test_an_axis_of_words_is_read_downwards_and_none_is_cut() -> None:
    parts = Labelled(torch.tensor([0.5, -2.0]), [Axis("component", ("embed", "0_attn_out"))], "x")
    heads = Labelled(torch.tensor([0.5, -2.0]), [Axis("head", ("0", "1"))], "x")
    assert [line.split() for line in repr(parts).splitlines()[2:]] == [
        ["embed", "0.5"],
        ["0_attn_out", "-2"],
    ]
    lines = [line.split() for line in repr(heads).splitlines()[1:]]
    assert lines == [["head", "0", "1"], ["0.5", "-2"]]


def test_metrics_are_what_they_say_of_the_last_logits() -> None:
    model = LanguageModel("tracekit/tiny")
    ids = [model.to_single_token(word) for word in ("Paris", "Rome")]
    logits = torch.randn(2, len(model.tokenizer))
    of = logits[:, ids[0]]
    assert torch.equal(logit(model, "Paris")(logits), of)
    assert torch.equal(logit_difference(model, "Paris", "Rome")(logits), of - logits[:, ids[1]])
    each = logit(model, ["Paris", "Rome"])(logits)
    assert torch.equal(each, torch.stack([logits[0, ids[0]], logits[1, ids[1]]]))
    shares = logits.exp()[:, ids[0]] / logits.exp().sum(-1)
    torch.testing.assert_close(probability(model, "Paris")(logits), shares)
    torch.testing.assert_close(log_probability(model, ids[0])(logits), shares.log())


def test_a_metric_that_gives_no_number_for_each_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"a tensor \[2\].*not \[2, 5\]"):
        measured(lambda logits: logits, torch.randn(2, 5))
    with pytest.raises(InputError, match="3 tokens for 2 prompts"):
        model = LanguageModel("tracekit/tiny")
        logit(model, [1, 2, 3])(torch.randn(2, 5))
