"""A small model that every trace leaves as it was, and the two ways in which a block can run."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch import nn

from tests.tracing.plain import small, state_of
from tracekit import Model, settings

LIFTED, IN_PLACE = "lifted", "in place"


@pytest.fixture(params=[LIFTED, IN_PLACE])
def each_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs twice: with blocks on a worker where they can be, and with all in place."""
    with settings.changed(lift_blocks=request.param == LIFTED):
        yield request.param


@pytest.fixture
def in_place() -> Iterator[None]:
    """Every block stays in place, with its model on another thread."""
    with settings.changed(lift_blocks=False):
        yield


@pytest.fixture
def net() -> nn.Sequential:
    return small()


@pytest.fixture
def model(net: nn.Sequential) -> Iterator[Model]:
    before = state_of(net)
    yield Model(net)
    assert state_of(net) == before


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What refers to itself stays alive."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
