"""docs/pictures.md is what tools/pictures.py writes, and has its screenshots, small ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    pytest.importorskip("PIL")
    spec = importlib.util.spec_from_file_location("tools_pictures", ROOT / "tools" / "pictures.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # its dataclasses look there
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


def test_the_page_is_what_the_tool_writes(tool: ModuleType) -> None:
    assert (ROOT / "docs" / "pictures.md").read_text("utf-8") == tool.page()


def test_each_screenshot_is_there_and_small_and_none_is_left_over() -> None:
    page = (ROOT / "docs" / "pictures.md").read_text("utf-8")
    named = set(re.findall(r"\(pictures/([^)]+)\)", page))
    there = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").iterdir()}
    assert named == set(there)
    assert all(8 <= size / 1000 < 150 for size in there.values())


def test_the_code_of_the_page_makes_its_pictures(tool: ModuleType) -> None:
    every = tool.pictures()
    assert "Paris 0.99" in every["lens"].html and "wrong-position" in every["report"].text
    assert re.search(r"moves most +layer 1, position 5 is: .* of the way", every["sweep"].text)
