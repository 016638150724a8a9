"""A tensor parallel model on two gloo ranks gives what it gives on one, or says that it can't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import blocks
from tests.distributed.blocks import IDS
from tests.distributed.launch import on_two_ranks
from tests.tiny_models import IS_TRANSFORMERS_5, make
from tracekit import LanguageModel
from tracekit.errors import InputError
from tracekit.testing import assert_tp_equal, save_tp_reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="refused before transformers 5"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
MODELS = ("llama", "qwen3", "gemma2", "mistral", "mixtral")
TOLERANCE = 5e-6  # of the largest value: rounding, as sums are made in two parts
BOTH = (
    *("edit_on_one", "edit_in_place_on_one", "other_values", "written_otherwise", "read_on_one"),
    *("skip_on_one", "stop_on_one", "caches_of_others", "block_on_one", "token_on_one"),
)
CASES = [
    (name, block)
    for name in MODELS
    for block in (blocks.OF_EXPERTS if name == "mixtral" else blocks.ALL)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have written what they found, of every model."""
    found = tmp_path_factory.mktemp("ranks")
    tokenizer = LanguageModel("tracekit/tiny").tokenizer
    for name in (*MODELS, "gpt2"):
        model: Any = make(name)[0]
        model.save_pretrained(found / name)
        tokenizer.save_pretrained(found / name)
    save_tp_reference(found / "reference.safetensors", LanguageModel(found / "llama"), IDS)
    on_two_ranks("tp_script.py", found, seconds=250)
    return found


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each rank had to say."""
    return [json.loads((folder / f"told-{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def off(several: torch.Tensor, one: torch.Tensor) -> float:
    """How far one is from the other, over the largest value."""
    assert several.shape == one.shape
    largest = one.double().abs().max().clamp_min(1e-30)
    return float((several.double() - one.double()).abs().max() / largest)


@pytest.mark.parametrize(
    ("name", "block"), CASES, ids=lambda it: it if isinstance(it, str) else it.__name__
)
def test_two_ranks_give_what_one_gives(
    folder: Path, name: str, block: Callable[[LanguageModel], blocks.Found]
) -> None:
    one = block(LanguageModel(folder / name))
    for rank in (0, 1):
        several = load_file(folder / f"{name}-{block.__name__}-{rank}.safetensors")
        assert several.keys() == one.keys()
        deviations = {key: off(several[key], one[key]) for key in one}
        assert max(deviations.values()) < TOLERANCE, deviations


@pytest.mark.parametrize("mistake", BOTH)
def test_ranks_that_do_not_do_the_same_all_end_with_an_error(
    told: list[dict[str, Any]], mistake: str
) -> None:
    assert [each[mistake]["error"] for each in told] == ["RankError", "RankError"]


def test_an_edit_on_one_rank_is_an_error_at_its_line_and_names_the_site(
    told: list[dict[str, Any]],
) -> None:
    lines = [each["edit_on_one"]["line"] for each in told]
    assert lines == ["layers[0].output[:] = 0", "tracer.result.logits  # the next request"]
    for each in told:
        assert "rank 0: asks to read model.model.layers.0.output" in each["edit_on_one"]["text"]


def test_an_edit_in_place_of_one_number_on_one_rank_is_found(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert "rank 0: wrote model.model.layers.0.output" in each["edit_in_place_on_one"]["text"]


def test_other_values_are_refused_at_the_line_that_writes_them(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["written_otherwise"]["line"] == "layers[1].output = noise  # the write"


def test_an_error_of_one_rank_is_its_own_and_the_other_learns_of_it(
    told: list[dict[str, Any]],
) -> None:
    other, own = (each["own_error_on_one"] for each in told)
    assert (own["error"], other["error"]) == ("KeyError", "RankError")
    assert "rank 1: left the run (KeyError: 'mine')" in other["text"]


@pytest.mark.parametrize(
    "what",
    ["operation", "scan", "start_at_layer", "shares_in_the_result", "verified"],
)
def test_what_can_not_be_whole_is_refused(told: list[dict[str, Any]], what: str) -> None:
    for each in told:
        assert each[what]["error"] == "UnsupportedError", each[what]


def test_invokes_are_refused(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["invokes"]["error"] == "RowsError"
        assert "lies on several ranks" in each["invokes"]["text"]


def test_a_model_goes_on_rightly_after_the_mistakes(folder: Path) -> None:
    for rank in (0, 1):
        before, after = (
            load_file(folder / f"llama-{when}-{rank}.safetensors") for when in ("reads", "again")
        )
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("how", ["plain", "sampled"])
def test_ranks_sample_the_same_tokens_whatever_their_seeds(
    told: list[dict[str, Any]], how: str
) -> None:
    assert told[0][how] == told[1][how]


def test_a_model_without_a_plan_says_so(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["gpt2"]["error"] == "LoadingError"
        assert "has no `tp_plan`" in each["gpt2"]["text"]


def test_assert_tp_equal_compares_with_a_model_and_with_a_file(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert each["compared"]["worst"] < TOLERANCE
        assert each["compared"]["values"] > 30
        assert each["compared"]["good"].startswith("2 ranks give what one gives: ")
        assert each["compared"]["from_file"].startswith("2 ranks give what one gives: ")


def test_assert_tp_equal_fails_on_both_ranks_for_a_weight_damaged_on_one(
    told: list[dict[str, Any]],
) -> None:
    for each in told:
        assert each["compared"]["bad"]["error"] == "AssertionError"
        assert "model.model.layers.1.mlp: off by" in each["compared"]["bad"]["text"]
        assert "layers.0" not in each["compared"]["bad"]["text"]


def test_a_reference_for_another_input_is_named(told: list[dict[str, Any]]) -> None:
    for each in told:
        assert "a reference for another input" in each["compared"]["other_input"]["text"]


def test_assert_tp_equal_wants_several_ranks() -> None:
    model = LanguageModel("tracekit/tiny")
    with pytest.raises(InputError, match="under torchrun"):
        assert_tp_equal(model, IDS, reference=model)
