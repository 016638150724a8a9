"""65 architectures of transformers as tiny random models, made offline: the matrix of the tests.

    model, inputs = make("llama")                      # eval(), float32, CPU, seeded
    model(**inputs)
    if SPECS["llama"].generate:
        generate("llama", model, inputs)

As a script it builds, runs and times every entry, or those named:

    python -m tests.tiny_models [llama t5 ...]
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

from tests.matrix import audio, decoder_relatives, decoders, encoders, relatives, vision
from tests.matrix.spec import Inputs, Spec

__all__ = ["NAMES", "RELATIVES", "SPECS", "generate", "make"]

EVERY_SPEC: dict[str, Spec] = {
    **decoders.SPECS,
    **encoders.SPECS,
    **vision.SPECS,
    **audio.SPECS,
}
# Configured or laid out otherwise before transformers 5.
NEED_TRANSFORMERS_5 = {
    "granitemoehybrid",
    "xlstm",
    "vit",
    "llava",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "paligemma",
    "ast",
    "qwen2_audio",
}
IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

SPECS = {
    name: spec
    for name, spec in EVERY_SPEC.items()
    if IS_TRANSFORMERS_5 or name not in NEED_TRANSFORMERS_5
}
NAMES = list(SPECS)
# Close to these; only the proofs of standard names run them.
RELATIVES = {**relatives.SPECS, **decoder_relatives.SPECS}


def make(
    name: str, seed: int = 0, attn: str | None = None, **config: Any
) -> tuple[torch.nn.Module, Inputs]:
    """The model in eval mode, and the arguments of a forward pass; `config` overrides its sizes."""
    torch.manual_seed(seed)
    model, inputs = {**RELATIVES, **SPECS}[name].build(attn=attn, **config)
    model.eval()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = None  # never stop early,
        generation.pad_token_id = 0  # nor warn about padding
    return model, inputs


def generate(name: str, model: torch.nn.Module, inputs: Inputs, **options: Any) -> torch.Tensor:
    """The tokens of a greedy generation of three steps; `options` are transformers'."""
    spec = SPECS[name]
    defaults = {"max_new_tokens": 3, "do_sample": False}
    return model.generate(  # pyright: ignore
        **{**spec.gen_inputs(inputs), **defaults, **spec.generation, **options}
    )


def row_of_table(name: str) -> str:
    """Build and run one entry; its line of the table."""
    spec = SPECS[name]
    start = time.perf_counter()
    model, inputs = make(name)
    built = time.perf_counter()
    with torch.no_grad():
        model(**inputs)
        ran = time.perf_counter()
        tokens = generate(name, model, inputs) if spec.generate else None
    generated = time.perf_counter()
    for path in spec.layers:
        model.get_submodule(path)
    size = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{name:18s} {spec.family:8s} {type(model).__name__:38s} {size:7d} parameters, "
        f"built in {built - start:.2f} s, forward {ran - built:.2f} s, "
        f"generate {generated - ran:.2f} s {'' if tokens is None else tuple(tokens.shape)}"
    )


def main(names: list[str]) -> int:
    """Print the table; the number of entries that failed is the exit status."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failed = 0
    for name in names:
        try:
            print(row_of_table(name))
        except Exception as error:
            failed += 1
            at = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{name:18s} FAILED {type(error).__name__}: {error} ({at.filename}:{at.lineno})")
    print(f"{len(names) - failed} of {len(names)} run")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or NAMES))
