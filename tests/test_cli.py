"""The command line: the demo shows Paris emerging, and an edit that its cache proves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import tracekit
from tracekit import Cache, LanguageModel, cli
from tracekit.cli import demo, status

ROOT = Path(__file__).parent.parent
LENS_LINE = re.compile(r"^ +(\d) +(\w+) +(\d\.\d+) +(\d\.\d+)  (#*)\.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def shown() -> str:
    """What `tracekit demo` prints, from a process of its own: as a user gets it."""
    done = subprocess.run(
        [sys.executable, "-m", "tracekit.cli", "demo"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the demo is quiet"
    return done.stdout


def test_paris_emerges_over_the_blocks(shown: str) -> None:
    lines = LENS_LINE.findall(shown)
    assert [int(block) for block, *_ in lines] == [0, 1, 2, 3]
    shares = [float(share) for _, _, _, share, _ in lines]
    assert shares[0] < 0.5 and shares[-1] > 0.9
    assert shares == sorted(shares)
    bars = [len(bar) for *_, bar in lines]
    assert bars == sorted(bars) and bars[-1] == demo.BAR
    assert lines[-1][1] == "Paris"


def test_the_lens_of_the_demo_is_that_of_hugging_faces_hidden_states(shown: str) -> None:
    model = LanguageModel("tracekit/tiny")
    with torch.no_grad():
        states = model(demo.PROMPT, output_hidden_states=True).hidden_states
        normed = [*(model.transformer.ln_f(state) for state in states[1:-1]), states[-1]]
        chances = [model.lm_head(state)[0, -1].softmax(dim=-1) for state in normed]
    for (_, word, probability, _, _), chance in zip(LENS_LINE.findall(shown), chances, strict=True):
        assert model.tokenizer.decode(chance.argmax()) == word
        assert float(probability) == pytest.approx(chance.max().item(), abs=1e-3)


def test_the_edit_turns_the_answer_and_the_cache_proves_it(shown: str) -> None:
    assert re.search(r"before +Paris", shown)
    assert re.search(r"after +Rome", shown)
    assert re.search(
        r"ok +it holds exactly what was written at model\.transformer\.h\.0\.attn", shown
    )
    assert re.search(r"ok +the 7 modules that ended before it are the same, bit for bit", shown)
    assert "FAILED" not in shown


def test_the_demo_fits_a_screen_of_plain_text(shown: str) -> None:
    lines = shown.splitlines()
    assert shown.isascii()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80


def test_in_process_it_prints_the_same_and_leaves_transformers_as_it_was(
    shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capsys.readouterr()
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == shown
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert torch.is_grad_enabled()


def test_a_check_that_does_not_hold_is_shown_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never_same(one: Cache, other: Cache, path: str) -> bool:
        return False

    monkeypatch.setattr(demo, "_same", never_same)
    assert cli.main(["demo"]) == status.CHECK_FAILED
    assert re.search(r"FAILED +the 7 modules that ended before it", capsys.readouterr().out)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"tracekit {tracekit.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_a_wrong_command_line_shows_what_there_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage: tracekit" in capsys.readouterr().err
