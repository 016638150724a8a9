"""What it costs that the ranks of a tensor parallel model meet: milliseconds of a run on two ranks.

    torchrun --nproc-per-node 2 benchmarks/ranks.py [layers width]

Made offline, of random weights; gloo on CPU. On each line: the median of interleaved rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from tracekit import LanguageModel

ROUNDS = 30
IDS = torch.arange(64).view(1, 64)


def model_of(folder: Path, layers: int, width: int) -> LanguageModel:
    """A Llama of that size, on all ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width}
        sizes |= {"intermediate_size": 3 * width, "num_attention_heads": 8, "vocab_size": 1000}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    dist.barrier()
    tokenizer = LanguageModel("tracekit/tiny").tokenizer
    return LanguageModel(folder, tokenizer=tokenizer, tp_plan="auto")


def ways(model: LanguageModel) -> dict[str, Callable[[], object]]:
    """What is compared: the bare model, and what is done with it."""

    def recorded() -> None:
        with model.trace(IDS) as tracer:
            tracer.cache("*.mlp")

    def recorded_shares() -> None:
        with model.trace(IDS) as tracer:
            tracer.cache("*.q_proj")

    def read() -> None:
        with model.trace(IDS):
            _ = model.model.layers[1].output

    def edited() -> None:
        with model.trace(IDS):
            model.model.layers[1].output[:, 0] = 0

    return {
        "bare model": lambda: model.module(IDS, use_cache=False),
        "cache of each MLP": recorded,
        "cache of each q_proj (gathered)": recorded_shares,
        "one read": read,
        "one edit": edited,
    }


def main(layers: int, width: int, folder: Path) -> None:
    model = model_of(folder, layers, width)
    acts = ways(model)
    times: dict[str, list[float]] = {name: [] for name in acts}
    begun = time.perf_counter()
    with torch.no_grad(), model.trace(IDS):
        pass
    first = time.perf_counter() - begun
    counted: dict[str, int] = {}
    meeting = model._tree.sharding.meeting  # pyright: ignore[reportPrivateUsage] - to count them
    for _ in range(ROUNDS):
        for name, act in acts.items():
            dist.barrier()
            before, begun = meeting.count, time.perf_counter()
            with torch.no_grad():
                act()
            times[name].append((time.perf_counter() - begun) * 1000)
            counted[name] = meeting.count - before
    if dist.get_rank() == 0:
        print(f"{layers} layers, width {width}, 64 tokens; measured once, in {first:.1f} s")
        for name, each in times.items():
            print(f"{name:34}{statistics.median(each):8.1f} ms {counted[name]:4} meetings")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sizes = [int(each) for each in sys.argv[1:]] or [8, 512]
    shared = Path(tempfile.gettempdir()) / f"tracekit-ranks-{os.environ['TORCHELASTIC_RUN_ID']}"
    main(sizes[0], sizes[1], shared)
