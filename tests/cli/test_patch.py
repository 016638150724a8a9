"""`tracekit patch`: each place is what a plain hook at that place gives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import PROMPT, Tell
from tracekit import LanguageModel
from tracekit.analysis import Metric
from tracekit.cli import patch, status

OTHER = "The Big Ben is in the city of"
PAIR = ("patch", "tracekit/tiny", "--clean", PROMPT, "--corrupted", OTHER)


@pytest.fixture(scope="module")
def logits(tiny: LanguageModel) -> Callable[..., torch.Tensor]:
    """`logits(text, layer, position, other)`: the last ones, patched with a hook of our own."""

    def run(text: str, layer: int = 0, position: int = 0, other: str = "") -> torch.Tensor:
        ids = [tiny.tokenizer(each, return_tensors="pt")["input_ids"] for each in (text, other)]
        block, given = tiny.module.transformer.h[layer], list[Any]()
        with torch.no_grad():
            if not other:
                return tiny.module(ids[0]).logits[0, -1]
            handle = block.register_forward_pre_hook(lambda _m, args: given.append(args[0].clone()))
            tiny.module(ids[1])
            handle.remove()

            def write(_module: Any, args: Any) -> Any:
                value = args[0].clone()
                value[:, position] = given[0][:, position]
                return (value, *args[1:])

            handle = block.register_forward_pre_hook(write)
            found = tiny.module(ids[0]).logits[0, -1]
            handle.remove()
            return found

    return run


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_json_is_what_plain_hooks_give(
    direction: str, tell: Tell, tiny: LanguageModel, logits: Callable[..., torch.Tensor]
) -> None:
    found = tell(*PAIR, "--direction", direction, "--json").json
    base, other = (OTHER, PROMPT) if direction == "denoise" else (PROMPT, OTHER)
    right, wrong = (tiny.tokenizer.convert_tokens_to_ids(each) for each in ("Paris", "London"))
    assert (found["right"], found["wrong"]) == ("Paris", "London")

    def measured(each: torch.Tensor) -> float:
        return (each[right] - each[wrong]).item()

    assert found["clean"] == pytest.approx([measured(logits(PROMPT))], abs=1e-3)
    assert found["corrupted"] == pytest.approx([measured(logits(OTHER))], abs=1e-3)
    for layer, row in enumerate(found["values"]["values"]):
        for position, value in enumerate(row):
            by_hand = measured(logits(base, layer, position, other))
            assert value == pytest.approx(by_hand, abs=1e-3), (layer, position)


def test_the_table_says_what_was_taken_and_what_was_saved(tell: Tell) -> None:
    told = tell(*PAIR).out
    assert "taken as --right 'Paris' and --wrong 'London', what the model says" in told
    assert re.search(r"logit of 'Paris' - 'London': clean 1\d\.\d+, corrupted -1\d\.\d+", told)
    assert re.search(r"^position +layer 0 +1 +2 +3$", told, re.MULTILINE)
    rows = dict(re.findall(r"^(\d '.+')((?: +-?[\d.]+){4})$", told, re.MULTILINE))
    assert len(rows) == 9
    eiffel = [float(each) for each in rows["2 'Eiffel'"].split()]
    last = [float(each) for each in rows["8 'of'"].split()]
    assert eiffel[0] > 0.5 > abs(eiffel[1]), "the fact is read in layer 0,"
    assert last[0] < 0.1 and last[1] > 0.9, "and is at the last position from layer 1 on"
    counts = re.search(r"computed (\d+) layer-tokens of ([\d,]+)", told)
    assert counts and int(counts[1]) < int(counts[2].replace(",", "")) == 4 * 9 * 36
    assert re.search(r"8 drawn at random and computed whole: logits off by \d", told)


def test_answers_that_are_given_are_not_told_as_found(tell: Tell) -> None:
    told = tell(*PAIR, "--right", "Paris", "--wrong", "Rome").out
    assert "taken as" not in told and "logit of 'Paris' - 'Rome'" in told


def test_heads_have_a_table_and_three_axes_a_list(tell: Tell) -> None:
    heads = tell(*PAIR, "--over", "layer,head", "--activation", "z").out
    assert re.search(r"^layer +head 0 +1 +2 +3$", heads, re.MULTILINE)
    three = tell(*PAIR, "--over", "layer,position,head", "--activation", "z").out
    assert re.search(r"^ +layer +position +head$", three, re.MULTILINE)
    assert len(re.findall(r"^-?0\.\d+ +\d +\d '\w+' +\d$", three, re.MULTILINE)) == 10


def test_prompts_of_unequal_length_are_shown_side_by_side(tell: Tell) -> None:
    told = tell(*PAIR[:-1], "The Colosseum is in the city of")
    assert (told.status, told.out) == (2, "")
    assert "the prompts have 9 and 8 tokens" in told.err
    lines = told.err.splitlines()
    assert lines[4].split() == ["2", "'Eiffel'", "'Colosseum'", "differs"]
    assert lines[10].split() == ["8", "'of'", "differs"]
    assert lines[-1] == "Give prompts of as many tokens. [input]"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--right", "Paris", "--wrong", "Paris"], "right and wrong are both 'Paris'"),
        (["--wrong", "Atlantis"], "'Atlantis' is not among the tokens that the model knows"),
        (["--corrupted", PROMPT], "the same tokens"),
        (["--over", "layer,rows"], "rows"),
        (["--activation", "residual"], "residual"),
    ],
)
def test_what_can_not_be_is_told_in_words(more: list[str], text: str, tell: Tell) -> None:
    told = tell(*PAIR, *more)
    assert (told.status, told.out) == (2, "")
    assert text in told.err and "Traceback" not in told.err


def test_an_interrupt_shows_what_is_done(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = patch._metric, list[int]()

    def impatient(*given: Any) -> Metric:
        metric = real(*given)

        def measure(logits: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 20:
                raise KeyboardInterrupt
            return metric(logits)

        return Metric(metric.name, measure)

    monkeypatch.setattr(patch, "_metric", impatient)
    told = tell(*PAIR)
    assert told.status == status.INTERRUPTED
    assert re.search(r"interrupted: \d+ of 36 patches are done", told.out)
    calls.clear()
    found = tell(*PAIR, "--json")
    assert found.status == status.INTERRUPTED and found.json["is_complete"] is False
    values = [value for row in found.json["values"]["values"] for value in row]
    assert None in values and any(value is not None for value in values)


def test_the_page_has_the_words(tell: Tell, tmp_path: Path) -> None:
    page = tmp_path / "patch.html"
    assert tell(*PAIR, "--html", str(page)).status == 0
    text = page.read_text("utf-8")
    assert "Eiffel" in text and "<html" in text
