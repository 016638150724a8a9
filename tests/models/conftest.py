"""The models that most of these tests run: a random GPT-2, bare and wrapped; the packaged one."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.tiny_models import make
from tracekit import LanguageModel, Model


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2")[0]


@pytest.fixture(scope="module")
def model(net: nn.Module) -> Model:
    return Model(net)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")
