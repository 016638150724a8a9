"""A model whose weights don't fit is harvested like the same model in memory, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tracekit import LanguageModel, harvest

TEXTS = ["The Eiffel Tower is in the city of Paris", "Paris", "hot : cold , big :", "The Colosseum"]


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto", "max_memory": {"cpu": "2MB"}},
        {"device_map": {"": "disk"}},
    ],
    ids=["2 MB", "disk"],
)
def test_a_model_that_does_not_fit_gives_the_files_of_one_in_memory(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = LanguageModel("tracekit/tiny")
    offloaded = LanguageModel("tracekit/tiny", offload_folder=str(tmp_path / "weights"), **options)
    assert any(weight.is_meta for weight in offloaded.module.parameters())
    for name, model in (("whole", whole), ("offloaded", offloaded)):
        harvest(model, TEXTS, ["resid_post", ("z", 1)], tmp_path / name, progress=False)
    (one,) = (tmp_path / "whole").iterdir()
    (other,) = (tmp_path / "offloaded").iterdir()
    assert one.read_bytes() == other.read_bytes()
