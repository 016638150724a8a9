"""Models that are sharded or wrapped for data parallel training: traced rightly, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.distributed import data_parallel
from tests.distributed.data_parallel import IDS_OF_RANK, Found
from tests.distributed.launch import on_two_ranks
from tests.tiny_models import make
from tracekit import LanguageModel, Model
from tracekit.errors import InputError

Block = Callable[[LanguageModel, torch.Tensor], Found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have written what they found."""
    found = tmp_path_factory.mktemp("ranks")
    model: Any = make("llama")[0]
    model.save_pretrained(found / "llama")
    LanguageModel("tracekit/tiny").tokenizer.save_pretrained(found / "llama")
    on_two_ranks("fsdp_script.py", found)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("block", data_parallel.blocks, ids=lambda block: block.__name__)
def test_under_fsdp2_each_rank_has_what_one_has_for_its_batch(folder: Path, block: Block) -> None:
    for rank, ids in enumerate(IDS_OF_RANK):
        told = json.loads((folder / f"fsdp-{rank}.json").read_text("utf-8"))
        assert told.keys() == {"kind of weight", "alone"}, "each block ran"
        assert told["kind of weight"] == "DTensor"
        one = block(LanguageModel(folder / "llama"), ids)
        several = load_file(folder / f"fsdp-{block.__name__}-{rank}.safetensors")
        assert several.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(several[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_rank_that_waits_alone_is_told_so_when_the_time_of_its_group_is_up(folder: Path) -> None:
    first, second = (
        json.loads((folder / f"fsdp-{rank}.json").read_text("utf-8"))["alone"] for rank in (0, 1)
    )
    assert first.startswith("rank 0 waited for the other ranks of the model, and they did not come")
    assert second == ""


def test_a_wrapper_is_refused_and_the_module_in_it_is_traced() -> None:
    wrapper = nn.DataParallel(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"Model\(module\.module\)"):
        Model(wrapper)
    with Model(wrapper.module).trace(torch.ones(1, 2)) as tracer:
        out = tracer.result
    assert out.shape == (1, 2)
