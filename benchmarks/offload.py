"""What it costs to capture all residuals while generating on an accelerator, batch by batch.

    python benchmarks/offload.py [--rounds 20] [--batches 1 16 64] [--json FILE] [--fake]

Beside the bare `generate`: tracekit's cache, whose values leave the device beside the model; the
same with `settings.offload_bytes = 0`; and hooks that copy each value with `.to("cpu")`, as is the
custom elsewhere. Each is timed right behind a bare generation, in rounds; the ratios are of
medians, with their 95 % interval. Without an accelerator it says so, and ends. `--fake` runs all of
it on the processor, small, through the accelerator of the tests: whether it runs, and no figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import torch  # noqa: E402
import transformers  # noqa: E402
from timing import Estimate, Job, Part, measure, quartiles, ratio  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from versions import versions  # noqa: E402

from tracekit import LanguageModel, settings  # noqa: E402
from tracekit.core.streams import lane_of  # noqa: E402

BOUND, FROM_BATCH = 1.07, 16  # of the bare generation
Run = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """A GPT-2 that has learnt nothing, and how much it reads and writes."""

    title: str
    layers: int
    width: int
    dtype: torch.dtype
    prompt: int = 64  # tokens
    new: int = 64


SIZES = (
    Size("12 layers, width 768, float32", 12, 768, torch.float32),
    Size("24 layers, width 2048, bfloat16", 24, 2048, torch.bfloat16),
)
FAKE = (Size("2 layers, width 32, float32", 2, 32, torch.float32, prompt=5, new=4),)


@dataclass(frozen=True)
class Row:
    """`found` is a ratio to the bare generation; it must be at most `bound`, if there is one."""

    size: str
    batch: int
    what: str
    bound: float | None
    found: Estimate
    bare: float  # seconds

    @property
    def verdict(self) -> str:
        """ "ok" or "MISSED", with a "?" where the interval spans the bound."""
        if self.bound is None:
            return ""
        verdict = "ok" if self.found.value <= self.bound else "MISSED"
        return verdict + "?" * (self.found.low <= self.bound < self.found.high)


def main() -> None:
    options = _options()
    device = torch.accelerator.current_accelerator()
    if not options.fake and (device is None or lane_of(device) is None):
        print("There is no accelerator here whose copies run beside its model: nothing to measure.")
        return
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print(versions())
    if options.fake or device is None:
        _fake(options)
        return
    print(f"on {torch.get_device_module(device).get_device_name(device)}")
    wait = partial(torch.accelerator.synchronize, device)
    rows: list[Row] = []
    for size in SIZES:
        for batch in options.batches:
            rows += _measured(Generation(size, batch, device, "cpu", wait), options.rounds)
    if options.json:
        told = [asdict(row) | {"verdict": row.verdict} for row in rows]
        options.json.write_text(json.dumps({"versions": versions(), "rows": told}, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of generations (default: 20)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], metavar="ROWS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--fake", action="store_true", help="only see that it runs, anywhere")
    return parser.parse_args()


def _fake(options: argparse.Namespace) -> None:
    from tests.fake_lane import HERE, Accelerator

    with Accelerator().at_work() as accelerator:
        for batch in options.batches:
            _measured(Generation(FAKE[0], batch, torch.device("cpu"), HERE, lambda: None), rounds=2)
        accelerator.check()
    print(f"fake: {accelerator.copies} copies, no fault; the figures above mean nothing")


# -- what runs ------------------------------------------------------------------------------------


class Generation:
    """One model on a device, and the ways to generate with it; each returns when all is done."""

    def __init__(
        self, size: Size, batch: int, device: torch.device, host: str, wait: Callable[[], None]
    ) -> None:
        self.size, self.batch, self.host, self._wait = size, batch, host, wait
        self.module: Any = _module(size).to(device, size.dtype)
        self.blocks: list[nn.Module] = list(self.module.transformer.h)
        generator = torch.Generator().manual_seed(0)
        shape = (batch, size.prompt)
        self.ids = torch.randint(3, 1000, shape, generator=generator).to(device)
        self.model = LanguageModel(self.module, tokenizer=_tokenizer())
        self.options = {"max_new_tokens": size.new, "do_sample": False}

    def bare(self) -> Tensor:
        found = self.module.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), **self.options
        )
        self._wait()
        return found

    def hooked(self) -> list[list[Tensor]]:
        """By hand: each value is copied at once, and the model waits for it."""
        kept: list[list[Tensor]] = [[] for _ in self.blocks]

        def keep_in(outputs: list[Tensor]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                value = output[0] if isinstance(output, tuple) else output
                outputs.append(value.detach().to("cpu"))

            return hook

        pairs = zip(self.blocks, kept, strict=True)
        handles = [block.register_forward_hook(keep_in(outputs)) for block, outputs in pairs]
        self.bare()
        for handle in handles:
            handle.remove()
        return kept

    def cached(self) -> list[list[Tensor]]:
        blocks, host = list(self.model.transformer.h), self.host
        with self.model.generate(self.ids, **self.options) as tracer:
            cache = tracer.cache(modules=blocks, device=host)
        self._wait()
        return [[entry.hidden for entry in cache[block]] for block in blocks]

    def cached_at_once(self) -> list[list[Tensor]]:
        with settings.changed(offload_bytes=0):
            return self.cached()

    def warm(self) -> None:
        self.module(input_ids=self.ids)
        self._wait()

    def empty(self) -> None:
        with self.model.generate(self.ids, **self.options):
            pass
        self._wait()


def _module(size: Size) -> Any:
    config = transformers.GPT2Config(
        vocab_size=1000,
        n_embd=size.width,
        n_head=max(size.width // 64, 1),
        n_layer=size.layers,
        n_positions=size.prompt + size.new,
    )
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config).eval()
    module.generation_config.eos_token_id = None  # what is asked for comes
    module.generation_config.pad_token_id = 0
    return module


def _tokenizer() -> Any:
    from tracekit.models.tiny import WEIGHTS

    return transformers.AutoTokenizer.from_pretrained(WEIGHTS)


# -- the same work, and its time ------------------------------------------------------------------


def _measured(generation: Generation, rounds: int) -> list[Row]:
    with torch.no_grad():
        _agree(generation)
        runs: dict[str, Run] = {
            "tracekit: cache of every block": generation.cached,
            "tracekit: each value at once": generation.cached_at_once,
            'hooks with .to("cpu")': generation.hooked,
            "tracekit: a trace with nothing in it": generation.empty,
        }
        bare = Part(generation.bare, generation.warm)
        jobs = {name: Job(Part(run, generation.warm), bare) for name, run in runs.items()}
        timings = measure(jobs, rounds, time.perf_counter)
    size, batch = generation.size.title, generation.batch
    rows: list[Row] = []
    for what, timing in timings.items():
        is_bound = what == next(iter(runs)) and batch >= FROM_BATCH
        found = ratio(timing.work, timing.base)
        seconds = quartiles(timing.base)[1]
        rows.append(Row(size, batch, what, BOUND if is_bound else None, found, seconds))
    _print(rows)
    return rows


def _agree(generation: Generation) -> None:
    """Check that all keep what the hooks keep; AssertionError if one does not."""
    expected = generation.hooked()
    for run in (generation.cached, generation.cached, generation.cached_at_once):
        for found, by_hand in zip(run(), expected, strict=True):
            assert len(found) == len(by_hand) == generation.size.new
            for one, other in zip(found, by_hand, strict=True):
                torch.testing.assert_close(one, other)


def _print(rows: list[Row]) -> None:
    first = rows[0]
    print(f"\n{first.size}, batch {first.batch}: bare generate {1e3 * first.bare:.1f} ms")
    print(f"  {'over the bare generation':<40} must be  measured  [95 %]")
    for row in rows:
        bound = "      " if row.bound is None else f"≤ {row.bound:4.2f}"
        found = row.found
        print(
            f"  {row.what:<40} {bound}   {found.value:6.3f}    "
            f"[{found.low:.3f}, {found.high:.3f}]  {row.verdict}"
        )


if __name__ == "__main__":
    main()
