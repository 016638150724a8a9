"""One Chromium for all tests that look at pictures, and one of each picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.viz.browsers import lacking
from tests.viz.examples import every
from tracekit import LanguageModel, Picture

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium. Where there is none the tests are skipped; in CI that is a failure."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("playwright is not installed: pip install playwright")
        return
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        lacking("there is no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="session")
def pictures(model: LanguageModel) -> Mapping[str, Picture]:
    """A picture of each kind."""
    return every(model)
