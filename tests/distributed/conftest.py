"""Every transport with a host of the packaged model: each is started once, and ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.hosts import opened
from tracekit import LanguageModel
from tracekit.distributed import ModelHost

TRANSPORTS = ["local", "socket", pytest.param("ray", marks=[pytest.mark.slow])]


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """The client's own model, with weights: what a host gives is held against it."""
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module", params=TRANSPORTS)
def host(request: pytest.FixtureRequest, model: LanguageModel) -> Iterator[ModelHost]:
    with opened(request.param, model) as found:
        yield found
