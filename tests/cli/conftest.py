"""How the tests here give commands: in this process, with what was printed as the answer."""

from __future__ import annotations

import json
from typing import Any, Protocol

import pytest

from tracekit import LanguageModel, cli

PROMPT = "The Eiffel Tower is in the city of"


class Told:
    """What a command printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        """All of standard output, as JSON."""
        return json.loads(self.out)


class Tell(Protocol):
    def __call__(self, *arguments: str) -> Told: ...


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tell:
    """`tell("tree", "--json")` gives a command, as if in a wide terminal that is none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("TRACEKIT_DEBUG", raising=False)

    def give(*arguments: str) -> Told:
        capsys.readouterr()
        status = cli.main(list(arguments))
        return Told(status, *capsys.readouterr())

    return give


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")
