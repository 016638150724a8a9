"""What happens where there is no browser."""

from __future__ import annotations

import os

import pytest


def lacking(what: str) -> None:
    """Skip the test; in CI that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
