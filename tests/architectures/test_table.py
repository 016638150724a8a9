"""ARCHITECTURES.md says what the matrix says."""

from pathlib import Path

import pytest

from tests.architectures.table import page
from tests.tiny_models import IS_TRANSFORMERS_5

PAGE = Path(__file__).parent.parent.parent / "ARCHITECTURES.md"


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="the page is made with transformers 5")
def test_the_page_of_architectures_is_up_to_date() -> None:
    expected = PAGE.read_text()
    assert page().strip() == expected.strip(), (
        "python -m tests.architectures.table > ARCHITECTURES.md"
    )
