"""What runs behind a shared prefix cost, beside runs of the whole text and caches used by hand.

    python benchmarks/prefix.py [--prefix 512] [--suffix 16] [--suffixes 32] [--rounds 3] [--cpu]

A model of GPT-2 small's size (random weights) reads one prefix and many suffixes, without gradients
and on one torch thread. For each suffix every contender runs once in each round, in an order that
is shuffled anew, so that a machine that slows down slows all of them; the whole text runs in the
first round alone. Behind a ratio of medians stands its 95 % interval. --cpu counts the process's
own time, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from timing import Clock, Estimate, Series, quartiles, ratio  # noqa: E402
from torch import Tensor  # noqa: E402

from tracekit import LanguageModel  # noqa: E402

FASTER_THAN_WHOLE: Final = 10.0
SLOWER_THAN_HAND: Final = 1.1
WHOLE: Final = "whole text"
BY_HAND: Final = ("crop and reuse", "deepcopy", "shallow copy", "own buffers")

Run = Callable[[Tensor], Tensor]  # ids of a suffix to its logits


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=options.prefix + options.suffix)
    module: Any = transformers.GPT2LMHeadModel(config).eval()
    prefix = torch.randint(0, config.vocab_size, (1, options.prefix))
    suffixes = [
        torch.randint(0, config.vocab_size, (1, options.suffix)) for _ in range(options.suffixes)
    ]
    with torch.no_grad():
        clock = time.process_time if options.cpu else time.perf_counter
        runs, filled = _contenders(module, prefix, options.suffix, clock)
        _check_agreement(runs, suffixes[0])
        series = _measured(runs, suffixes, options.rounds, clock)
    return _report(series, filled, len(suffixes))


def _contenders(
    module: Any, prefix: Tensor, suffix: int, clock: Clock
) -> tuple[dict[str, Run], float]:
    """By name; and the seconds that `model.prefill` took."""
    model: Any = LanguageModel(module)
    model.prefill(prefix)  # the first of all runs
    start = clock()
    shared = model.prefill(prefix)
    filled = clock() - start
    own = module(prefix, use_cache=True).past_key_values
    reused, buffers = copy.deepcopy(own), _Buffers(own, suffix)
    is_5 = int(transformers.__version__.partition(".")[0]) >= 5
    length = prefix.shape[1]

    def traced(ids: Tensor) -> Tensor:
        with model.trace(ids, prefix=shared):
            logits = model.lm_head.output
        return logits  # noqa: RET504 - the name is what the block hands back

    def cropped(ids: Tensor) -> Tensor:
        logits = module(ids, past_key_values=reused, use_cache=True).logits
        reused.crop(-ids.shape[1] if is_5 else length)
        return logits

    def copied(ids: Tensor) -> Tensor:
        return module(ids, past_key_values=copy.deepcopy(own), use_cache=True).logits

    def shallow(ids: Tensor) -> Tensor:
        fork = copy.copy(own)
        fork.layers = [copy.copy(layer) for layer in own.layers]
        return module(ids, past_key_values=fork, use_cache=True).logits

    def buffered(ids: Tensor) -> Tensor:
        logits = module(ids, past_key_values=buffers.kv_cache, use_cache=True).logits
        buffers.rewind()
        return logits

    def alone(ids: Tensor) -> Tensor:
        return module(ids, use_cache=False).logits

    def whole(ids: Tensor) -> Tensor:
        return module(torch.cat([prefix, ids], 1), use_cache=False).logits[:, length:]

    runs: dict[str, Run] = {"tracekit": traced, WHOLE: whole}
    runs |= dict(zip(BY_HAND, (cropped, copied, shallow, buffered), strict=True))
    return {**runs, "suffix alone": alone}, filled


class _Buffers:
    """The best that can be done by hand: room behind the prefix, written in place each time."""

    def __init__(self, own: Any, room: int) -> None:
        self.kv_cache = copy.copy(own)
        self.kv_cache.layers = [_buffer_class()(layer, room) for layer in own.layers]

    def rewind(self) -> None:
        for layer in self.kv_cache.layers:
            layer.rewind()


def _buffer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Buffer(DynamicLayer):
        def __init__(self, own: Any, room: int) -> None:
            super().__init__()
            rows, heads, self._start, width = own.keys.shape
            shape = rows, heads, self._start + room, width
            self._memory = own.keys.new_empty(shape), own.keys.new_empty(shape)
            for memory, source in zip(self._memory, (own.keys, own.values), strict=True):
                memory[:, :, : self._start] = source
            self.dtype, self.device, self.is_initialized = own.keys.dtype, own.keys.device, True
            self.rewind()

        def rewind(self) -> None:
            self.keys, self.values = (memory[:, :, : self._start] for memory in self._memory)

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
            for memory, new in zip(self._memory, (key_states, value_states), strict=True):
                memory[:, :, start:end] = new
            self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
            return self.keys, self.values

    return Buffer


def _check_agreement(runs: dict[str, Run], suffix: Tensor) -> None:
    logits = runs[WHOLE](suffix)
    for name, run in runs.items():
        if name != "suffix alone":
            for _ in range(2):
                torch.testing.assert_close(run(suffix), logits, atol=1e-3, rtol=1e-3)


def _measured(
    runs: dict[str, Run], suffixes: list[Tensor], rounds: int, clock: Clock
) -> dict[str, Series]:
    """The seconds of every contender, for each suffix."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0).shuffle
    for round_ in range(rounds):
        order = [name for name in runs if round_ == 0 or name != WHOLE]
        for suffix in suffixes:
            shuffle(order)
            for name in order:
                start = clock()
                logits = runs[name](suffix)
                found[name].append(clock() - start)
                del logits
    return {name: np.array(times) for name, times in found.items()}


def _report(series: dict[str, Series], filled: float, suffixes: int) -> int:
    """Print the table; 1 if a bound does not hold."""
    print(f"{'for each suffix, ms':18s} {'quartile':>9s} {'median':>9s} {'quartile':>9s}")
    for name, times in sorted(series.items(), key=lambda item: quartiles(item[1])[1]):
        print(f"{name:18s}" + "".join(f" {1e3 * each:9.1f}" for each in quartiles(times)))
    ours = series["tracekit"]
    best = min(BY_HAND, key=lambda name: quartiles(series[name])[1])
    whole = series[WHOLE]
    faster, slower = ratio(whole, ours[: len(whole)]), ratio(ours, series[best])
    total = filled + suffixes * quartiles(ours)[1]
    saved = suffixes * quartiles(whole)[1] / total
    holds = [
        _line("whole text / tracekit", faster, faster.value >= FASTER_THAN_WHOLE, "≥ 10"),
        _line(f"tracekit / {best}", slower, slower.value <= SLOWER_THAN_HAND, "≤ 1.1"),
    ]
    print(f"with the prefill ({filled:.2f} s), {suffixes} suffixes are {saved:.1f} times as fast")
    return 0 if all(holds) else 1


def _line(what: str, found: Estimate, holds: bool, bound: str) -> bool:
    interval = f"{found.low:.2f} to {found.high:.2f}"
    print(f"{what:32s} {found.value:6.2f} ({interval}), {bound}: {'yes' if holds else 'NO'}")
    return holds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, value in [("prefix", 512), ("suffix", 16), ("suffixes", 32), ("rounds", 3)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cpu", action="store_true", help="count the process's own time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
