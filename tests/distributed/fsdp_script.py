"""Run under torchrun, on each of two ranks: a model whose weights are sharded by FSDP2."""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from tests.distributed.data_parallel import IDS_OF_RANK, blocks
from tracekit import LanguageModel
from tracekit.core.shares import Ranks
from tracekit.errors import RankError
from tracekit.interleave.meeting import Meeting

RANK = int(os.environ["RANK"])


def waited_alone() -> str:
    """What is said where a rank meets the others, and these do not come."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    meeting = Meeting(Ranks(group, RANK, 2))
    said = ""
    if RANK == 0:
        try:
            meeting.exchange(1, 2, 3)
        except RankError as error:
            said = str(error)
    dist.barrier()
    return said


def main(folder: Path) -> None:
    told: dict[str, Any] = {}
    module = LanguageModel(folder / "llama").module
    for layer in module.model.layers:
        fully_shard(layer)
    fully_shard(module)
    model = LanguageModel(module, tokenizer=LanguageModel("tracekit/tiny").tokenizer)
    for block in blocks:
        try:
            found = {name: it.contiguous() for name, it in block(model, IDS_OF_RANK[RANK]).items()}
            save_file(found, folder / f"fsdp-{block.__name__}-{RANK}.safetensors")
        except Exception as error:
            told[block.__name__] = f"{type(error).__name__}: {error}"
    with torch.no_grad():
        told["kind of weight"] = type(module.model.layers[0].mlp.up_proj.weight).__name__
    told["alone"] = waited_alone()
    (folder / f"fsdp-{RANK}.json").write_text(json.dumps(told), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
