"""Every command's help has examples, and every example runs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Tell
from tracekit import LanguageModel, harvest
from tracekit.cli import guards
from tracekit.cli.arguments import parser

COMMANDS: dict[str, argparse.ArgumentParser] = next(
    dict(action.choices)  # type: ignore[call-overload]
    for action in parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)
HELPS = {name: each.format_help() for name, each in {**COMMANDS, "": parser()}.items()}
EXAMPLES = sorted(set(re.findall(r"^  tracekit (.+)$", "".join(HELPS.values()), re.MULTILINE)))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_examples_and_says_what_it_does(name: str) -> None:
    assert f"  tracekit {name}" in HELPS[name].partition("examples:")[2]
    assert name in HELPS[""]


def prepare(example: str) -> None:
    """Put what an example works on into the current directory."""
    if "texts.txt" in example or example.startswith("activations"):
        Path("texts.txt").write_text("The Eiffel Tower is in\nParis\nthe city of\n", "utf-8")
    if example.startswith("activations"):
        harvest(LanguageModel("tracekit/tiny"), "texts.txt", "resid_post", "acts", progress=False)


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_example_runs(
    example: str, tell: Tell, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(guards, "EXPERIMENTS", guards.EXPERIMENTS[:2])  # all are in test_doctor.py
    monkeypatch.chdir(str(tmp_path))
    prepare(example)
    told = tell(*shlex.split(example))
    assert told.status == 0, told.err
    assert told.out and not told.err
    if "--json" in example:
        assert told.json
