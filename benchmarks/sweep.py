"""A sweep of patches over layers and positions, beside the loop that everybody writes.

    python benchmarks/sweep.py [--width 512] [--tokens 128] [--vocabulary 1000] [--samples 24]

GPT-2 of 12 layers (random weights), one torch thread, no gradients, the process's own time. Every
residual stream in front of a layer at every position is patched. The loop is one whole forward of
the bare module for each patch, with a plain PyTorch hook; and the same with TransformerLens, on a
copy of the model. Loops take minutes: a few of their patches are timed, drawn at random and run in
between the sweep, and the median is scaled to all. What they give is held against the sweep.

Prompts differ in every token, so that no patch is saved by being the same; and, as a second case,
in the first token alone, where patches of the embeddings behind it change nothing and are not run.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from names import bridge_of  # noqa: E402
from torch import Tensor  # noqa: E402

from tracekit import LanguageModel  # noqa: E402
from tracekit.analysis import PatchSweep, patch_sweep  # noqa: E402

LAYERS: Final = 12
TOKEN: Final = 5  # whose logit is the metric
FASTER_THAN_HOOKS: Final = 3.0
FASTER_THAN_TRANSFORMER_LENS: Final = 4.0
OF_LAYER_TOKENS: Final = 0.3
TOLERANCE: Final = 1e-3

Cell = tuple[int, int]  # layer and position
Patch = Callable[[Cell], float]  # runs one patch, and gives the metric


@dataclass
class Loop:
    """A loop of whole forwards, of which some patches were run."""

    patch: Patch
    seconds: list[float] = field(default_factory=list)
    values: dict[Cell, float] = field(default_factory=dict)

    def run(self, cell: Cell) -> None:
        start = time.process_time()
        self.values[cell] = self.patch(cell)
        self.seconds.append(time.process_time() - start)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    module = _module(options)
    generator = torch.Generator().manual_seed(0)
    size = (2, options.tokens)
    clean, corrupted = torch.randint(3, options.vocabulary, size, generator=generator)[:, None]
    first = corrupted.clone()
    first[0, 0] = clean[0, 0]
    bridge = bridge_of(module)
    print(f"GPT-2, {LAYERS} layers of width {options.width}, {options.tokens} tokens")
    with torch.no_grad():
        holds = _measured("every token differs", module, bridge, clean, corrupted, options)
        _measured("the first token differs", module, bridge, first, corrupted, options)
    return 0 if holds else 1


def _module(options: argparse.Namespace) -> Any:
    config = transformers.GPT2Config(
        vocab_size=options.vocabulary,
        n_embd=options.width,
        n_head=options.width // 64,
        n_layer=LAYERS,
        n_positions=options.tokens,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


# -- the loops -------------------------------------------------------------------------------------


def _by_hooks(module: Any, clean: Tensor, corrupted: Tensor) -> Patch:
    """A whole forward of the bare module for each patch, with one hook."""
    stream = module(input_ids=clean, use_cache=False, output_hidden_states=True).hidden_states

    def patch(cell: Cell) -> float:
        layer, position = cell

        def write(_: Any, args: tuple[Tensor, ...]) -> None:
            args[0][:, position] = stream[layer][:, position]

        handle = module.transformer.h[layer].register_forward_pre_hook(write)
        logits = module(input_ids=corrupted, use_cache=False).logits
        handle.remove()
        return float(logits[0, -1, TOKEN])

    return patch


def _by_transformer_lens(bridge: Any, clean: Tensor, corrupted: Tensor) -> Patch:
    """The same, as one writes it with TransformerLens."""
    _, cache = bridge.run_with_cache(clean)

    def patch(cell: Cell) -> float:
        layer, position = cell
        name = f"blocks.{layer}.hook_resid_pre"

        def write(value: Tensor, hook: object) -> Tensor:
            value[:, position] = cache[name][:, position]
            return value

        logits = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, write)])
        return float(logits[0, -1, TOKEN])

    return patch


# -- side by side ----------------------------------------------------------------------------------


def _measured(
    title: str,
    module: Any,
    bridge: Any,
    clean: Tensor,
    corrupted: Tensor,
    options: argparse.Namespace,
) -> bool:
    """Run the sweep with some patches of the loops in between; whether the bounds hold."""
    loops = {"hooks": Loop(_by_hooks(module, clean, corrupted))}
    if bridge is not None:
        loops["TransformerLens"] = Loop(_by_transformer_lens(bridge, clean, corrupted))
    draw = random.Random(0)
    cells = LAYERS * options.tokens
    seen = apart = 0

    def metric(logits: Tensor) -> Tensor:
        """The logit; now and then the loops have a turn, whose time is not the sweep's."""
        nonlocal seen, apart
        seen += 1
        if seen % max(cells // options.samples, 1) == 0:
            start = time.process_time()
            cell = draw.randrange(LAYERS), draw.randrange(options.tokens)
            for loop in draw.sample(list(loops.values()), len(loops)):
                loop.run(cell)
            apart += time.process_time() - start
        return logits[:, TOKEN]

    for loop in loops.values():  # the first runs are slower
        loop.patch((1, 1))
    model = LanguageModel(module)
    start = time.process_time()
    short = clean[:, :4], corrupted[:, :4]
    patch_sweep(model, *short, lambda logits: logits[:, TOKEN], check=0, progress=False)
    proving = time.process_time() - start
    for loop in loops.values():
        loop.seconds.clear()
    start = time.process_time()
    found = patch_sweep(model, clean, corrupted, metric, progress=options.progress)
    seconds = time.process_time() - start - apart
    for name, loop in loops.items():
        _check_alike(name, loop, found)
    print(f"\n{title} (before, the first sweep of a model proves its cuts: {proving:.1f} s, once)")
    return _report(found, seconds, loops)


def _check_alike(name: str, loop: Loop, found: PatchSweep) -> None:
    for (layer, position), value in loop.values.items():
        off = abs(float(found.values.values[layer, position]) - value)
        assert off < TOLERANCE, f"{name} is off by {off:.1e} at layer {layer}, {position}"


def _report(found: PatchSweep, seconds: float, loops: dict[str, Loop]) -> bool:
    count = found.values.values.numel()
    print(f"  {count} patches in {seconds:.1f} s ({1e3 * seconds / count:.1f} ms each)")
    print(f"  deviation of logits {found.deviation:.1e} in {found.checked}; {found.how}")
    bounds = {"hooks": FASTER_THAN_HOOKS, "TransformerLens": FASTER_THAN_TRANSFORMER_LENS}
    holds: list[bool] = []
    for name, loop in loops.items():
        low, middle, high = (
            count * float(each) / seconds for each in np.percentile(loop.seconds, [25, 50, 75])
        )
        each = 1e3 * float(np.median(loop.seconds))
        holds.append(middle >= bounds[name])
        print(
            f"  {name + ' / sweep':24s} {middle:5.2f} ({low:.2f} to {high:.2f}, quartiles of "
            f"{len(loop.seconds)} patches of {each:.0f} ms, scaled), ≥ {bounds[name]:g}: "
            f"{'yes' if holds[-1] else 'NO'}"
        )
    part = found.layer_tokens / found.naive_layer_tokens
    holds.append(part <= OF_LAYER_TOKENS)
    print(
        f"  layer-tokens             {part:5.3f} of {found.naive_layer_tokens}, "
        f"≤ {OF_LAYER_TOKENS}: {'yes' if holds[-1] else 'NO'}; {found.unchanged} patches change "
        f"nothing"
    )
    return all(holds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    options = [("width", 512), ("tokens", 128), ("vocabulary", 1000), ("samples", 24)]
    for name, value in options:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--progress", action="store_true", help="show a bar")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
