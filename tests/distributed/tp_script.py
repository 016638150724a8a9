"""Run under torchrun, on each of two ranks: writes what it found into a folder."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

from tests.distributed import blocks
from tests.distributed.blocks import IDS
from tracekit import LanguageModel
from tracekit.testing import assert_tp_equal

RANK = int(os.environ["RANK"])


def load(path: Path) -> LanguageModel:
    return LanguageModel(path, tp_plan="auto")


def error_of(act: Callable[[], object]) -> dict[str, Any]:
    """The error, and the line in this file at which it was raised."""
    try:
        act()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.line for frame in frames if frame.filename == __file__]
        found = {"error": type(error).__name__, "text": str(error), "line": lines[-1]}
    else:
        found = {"error": None, "text": "", "line": None}
    dist.barrier()
    return found


def mistakes(model: LanguageModel) -> dict[str, dict[str, Any]]:  # noqa: PLR0915 - a list
    """What goes wrong if the ranks do not do the same."""
    layers = model.model.layers

    def edit_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            if RANK == 0:
                layers[0].output[:] = 0
            tracer.result.logits  # the next request

    def edit_in_place_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            h = layers[0].output
            if RANK == 0:
                h[0, 0, 0] += 1e-6
            tracer.result.logits  # the next request

    def other_values() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            h = layers[0].output
            h += RANK
            tracer.result.logits  # the next request

    def written_otherwise() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            noise = torch.full((2, 4, 32), float(RANK))
            layers[1].output = noise  # the write
            tracer.result.logits

    def read_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            if RANK == 1:
                layers[1].self_attn.q_proj.output
            tracer.result.logits

    def skip_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            x = layers[0].mlp.input
            if RANK == 0:
                layers[0].mlp.skip(x)
            tracer.result.logits

    def stop_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            layers[0].output
            if RANK == 1:
                tracer.stop()
            tracer.result.logits

    def own_error_on_one() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            layers[0].output
            if RANK == 1:
                raise KeyError("mine")
            tracer.result.logits

    def caches_of_others() -> None:
        with torch.no_grad(), model.trace(IDS) as tracer:
            tracer.cache(f"model.model.layers.{RANK}")

    def block_on_one() -> None:
        with torch.no_grad(), model.trace(IDS):
            if RANK == 1:
                layers[1].mlp.gate_proj.output

    def token_on_one() -> None:
        def other(ids: Any, scores: torch.Tensor) -> torch.Tensor:
            scores[:, 20 + RANK] = 1e9
            return scores

        with model.generate(IDS, max_new_tokens=3, logits_processor=[other]) as tracer:
            tracer.result

    def operation() -> None:
        with torch.no_grad(), model.trace(IDS):
            layers[0].mlp.source.self_act_fn_0.output

    def scan() -> None:
        with model.scan(IDS):
            layers[0].output

    def invokes() -> None:
        with model.trace() as tracer:
            with tracer.invoke(IDS):
                layers[0].output
            with tracer.invoke(IDS):
                layers[1].output

    def start_at_layer() -> None:
        with model.trace(torch.zeros(1, 3, 32), start_at_layer=1):
            layers[1].output

    def shares_in_the_result() -> None:
        module: Any = model.module
        module.set_attn_implementation("eager")
        try:
            with torch.no_grad(), model.trace(IDS, output_attentions=True) as tracer:
                tracer.result  # its patterns
        finally:
            module.set_attn_implementation("sdpa")

    def verified() -> None:
        with model.trace(IDS, verify=True):
            layers[0].output[:] = 0

    acts = (
        edit_on_one, edit_in_place_on_one, other_values, written_otherwise, read_on_one,
        skip_on_one, stop_on_one, own_error_on_one, caches_of_others, block_on_one, token_on_one,
        operation, scan, invokes, start_at_layer, shares_in_the_result, verified,
    )  # fmt: skip
    return {act.__name__: error_of(act) for act in acts}


def compared(model: LanguageModel, path: Path, folder: Path) -> dict[str, Any]:
    """assert_tp_equal, of the model as it is and of one that is damaged on one rank."""
    one = LanguageModel(path) if RANK == 0 else None
    good = assert_tp_equal(model, IDS, reference=one, names=["q", "pattern", "resid_post"])
    from_file = assert_tp_equal(model, IDS, reference=folder / "reference.safetensors")
    other_input = error_of(
        lambda: assert_tp_equal(model, IDS + 1, reference=folder / "reference.safetensors")
    )
    weight: Any = model.model.layers[1].mlp.down_proj.weight
    if RANK == 1:
        weight.to_local().data[0, 0] += 1
    bad = error_of(lambda: assert_tp_equal(model, IDS, reference=one))
    return {
        "good": repr(good), "values": len(good.deviations), "worst": good.deviations[good.worst],
        "from_file": repr(from_file), "bad": bad, "other_input": other_input,
    }  # fmt: skip


def main(folder: Path) -> None:
    told: dict[str, Any] = {}
    for path in sorted(each for each in folder.iterdir() if each.is_dir()):
        if path.name == "gpt2":
            told["gpt2"] = error_of(lambda path=path: load(path))
            continue
        model = load(path)
        for block in blocks.OF_EXPERTS if path.name == "mixtral" else blocks.ALL:
            found = {name: it.contiguous() for name, it in block(model).items()}
            save_file(found, folder / f"{path.name}-{block.__name__}-{RANK}.safetensors")
        if path.name == "llama":
            told |= mistakes(model)
            again = blocks.reads(model)
            save_file(
                {k: v.contiguous() for k, v in again.items()},
                folder / f"llama-again-{RANK}.safetensors",
            )
            torch.manual_seed(RANK)
            told["plain"] = model.generate(IDS, max_new_tokens=6, do_sample=True).tolist()
            torch.manual_seed(RANK)
            with model.generate(IDS, max_new_tokens=6, do_sample=True) as tracer:
                tokens = tracer.result
            told["sampled"] = tokens.tolist()
            told["compared"] = compared(model, path, folder)
    (folder / f"told-{RANK}.json").write_text(json.dumps(told), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    main(Path(sys.argv[1]))
