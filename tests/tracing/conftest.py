"""The two ways in which a block can run beside its model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tracekit import settings

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
