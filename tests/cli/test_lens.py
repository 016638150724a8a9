"""`tracekit lens`: numbers that are Hugging Face's hidden states, read out by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import PROMPT, Tell
from tracekit import LanguageModel


@pytest.fixture(scope="module")
def by_hand(tiny: LanguageModel) -> torch.Tensor:
    """What each layer would say, embeddings first: probabilities [layer, position, vocabulary]."""
    ids = tiny.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = tiny.module(ids, output_hidden_states=True).hidden_states
        normed = [*(tiny.module.transformer.ln_f(state) for state in states[:-1]), states[-1]]
        return torch.stack([tiny.module.lm_head(state)[0].softmax(-1) for state in normed])


def test_json_is_what_hidden_states_say(
    tell: Tell, tiny: LanguageModel, by_hand: torch.Tensor
) -> None:
    found = tell("lens", "tracekit/tiny", PROMPT, "--json", "--top", "3", "--token", "Rome").json
    assert (found["model"], found["text"], found["position"]) == ("tracekit/tiny", PROMPT, 8)
    assert found["layers"] == ["embed", "0", "1", "2", "3"]
    rome = tiny.tokenizer.convert_tokens_to_ids("Rome")
    assert torch.allclose(torch.tensor(found["probability"]), by_hand[..., rome], atol=1e-5)
    best = by_hand.topk(3, -1)
    for layer, position in ((0, 0), (1, 4), (4, 8)):
        said = found["says"][layer][position]
        assert [each["token"] for each in said] == [
            tiny.tokenizer.decode(token) for token in best.indices[layer, position]
        ]
        assert [each["probability"] for each in said] == pytest.approx(
            best.values[layer, position].tolist(), abs=1e-5
        )


def test_the_table_is_of_the_last_position_and_follows_the_answer(
    tell: Tell, by_hand: torch.Tensor, tiny: LanguageModel
) -> None:
    told = tell("lens", "tracekit/tiny", PROMPT, "--top", "1").out
    rows = re.findall(r"^(\w+) +([\d.]+) +(\d+) +[\d.]+  '(.+)' ([\d.]+)$", told, re.MULTILINE)
    assert "behind position 8, 'of', of 9 tokens" in told and "probability of 'Paris'" in told
    assert [row[0] for row in rows] == ["embed", "0", "1", "2", "3"]
    for (_, own, rank, word, chance), row in zip(rows, by_hand[:, -1], strict=True):
        paris = row[tiny.tokenizer.convert_tokens_to_ids("Paris")]
        assert float(own) == pytest.approx(paris.item(), abs=6e-4)
        assert int(rank) == int((row > paris).sum())
        assert (word, float(chance)) == (
            tiny.tokenizer.decode(row.argmax()),
            pytest.approx(row.max().item(), abs=6e-4),
        )


def test_another_position_follows_what_is_said_there(tell: Tell, by_hand: torch.Tensor) -> None:
    told = tell("lens", "tracekit/tiny", PROMPT, "--position", "1", "--json").json
    assert told["position"] == 1
    final = by_hand[-1, 1]
    assert told["probability"][-1][1] == pytest.approx(final.max().item(), abs=1e-5)
    assert told["rank"][-1][1] == 0
    everywhere = tell("lens", "tracekit/tiny", PROMPT, "--position", "all").out
    assert everywhere.startswith("Lens(resid_post: 5 layers, 9 positions")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--position", "9"], "the text has 9 tokens: 0 '<bos>' 1 'The'"),
        (["--position", "two"], "give a number, or all"),
        (["--token", "Paris Rome"], "2 tokens ('Paris', 'Rome'), not one"),
        (["--activation", "resid_pots"], "resid_p"),
        (
            ["--html", "no/such/folder/x.html"],
            "x.html can't be written: No such file",
        ),
        (["--html", "x.gif"], "saved as .html"),
    ],
)
def test_what_can_not_be_is_told_in_words(more: list[str], text: str, tell: Tell) -> None:
    told = tell("lens", "tracekit/tiny", PROMPT, *more)
    assert (told.status, told.out) == (2, "")
    assert text in told.err and "Traceback" not in told.err


def test_an_empty_text_has_no_positions(tell: Tell) -> None:
    assert "the text is empty" in tell("lens", "tracekit/tiny", "").err


def test_the_page_has_the_words(tell: Tell, tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    assert tell("lens", "tracekit/tiny", PROMPT, "--html", str(page)).status == 0
    text = page.read_text("utf-8")
    assert "Paris" in text and "Eiffel" in text and "<html" in text


def test_a_dtype_is_taken(tell: Tell) -> None:
    half: Any = tell("lens", "tracekit/tiny", PROMPT, "--dtype", "bfloat16", "--json").json
    full: Any = tell("lens", "tracekit/tiny", PROMPT, "--json").json
    off = abs(half["probability"][2][-1] - full["probability"][2][-1])
    assert 0 < off < 0.05


@pytest.mark.parametrize("command", [["lens"], ["patch", "--clean", "a", "--corrupted"]])
def test_a_model_that_reads_two_texts_is_refused(
    command: list[str], tell: Tell, tmp_path: Path, tiny: LanguageModel
) -> None:
    model = LanguageModel.from_config("t5", tokenizer=tiny.tokenizer)
    model.module.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    told = tell(command[0], str(tmp_path), *command[1:], "b")
    assert told.status == 2
    assert "is an encoder-decoder" in told.err
