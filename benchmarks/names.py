"""What standard names cost: everything cached, beside TransformerLens, and one attention pattern.

    python benchmarks/names.py [--widths 64 768] [--tokens 64] [--rounds 40] [--cpu]

GPT-2 of 12 layers (random weights), one torch thread, no gradients; TransformerLens runs a copy
of the same model, by its bridge. Jobs are interleaved as in timing.py. Behind a ratio is its
95 % interval. --cpu counts the process's own time, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import torch  # noqa: E402
from subjects import Subject, random_subject  # noqa: E402
from timing import Job, Part, Timing, measure, quartiles, ratio  # noqa: E402

from tracekit import LanguageModel  # noqa: E402

LAYER: Final = 6  # whose pattern is read
OF_TRANSFORMER_LENS: Final = 0.3  # what ours costs over the bare model, of what theirs does
OF_EAGER_ATTENTION: Final = 1.5

Run = Callable[[], object]


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    clock = time.process_time if options.cpu else time.perf_counter
    holds: list[bool] = []
    for width in options.widths:
        subject = random_subject(width, options.tokens)
        with torch.no_grad():
            runs, bare = _runs(subject)
            timings = measure(_jobs(runs, bare), options.rounds, clock)
        holds += _report(f"12 layers of width {width}, {options.tokens} tokens", timings)
    return 0 if all(holds) else 1


def _runs(subject: Subject) -> tuple[dict[str, Run], Run]:
    """What is timed, by name, and the bare model."""
    model: Any = LanguageModel(subject.module)
    bare = partial(subject.module, input_ids=subject.ids, use_cache=False)

    def empty() -> None:
        with model.trace(subject.ids):
            pass

    def pattern() -> Any:
        with model.trace(subject.ids) as tracer:
            cache = tracer.cache(names=[("pattern", LAYER)])
        return cache  # noqa: RET504 - the name is what the block hands back

    runs: dict[str, Run] = {
        "run_with_cache": lambda: model.run_with_cache(subject.ids),
        "empty trace": empty,
        "pattern of one layer": pattern,
        "eager attention, one layer": _eager_attention(subject),
    }
    bridge = bridge_of(subject.module)
    if bridge is not None:
        _check_alike(model.run_with_cache(subject.ids)[1], bridge.run_with_cache(subject.ids)[1])
        runs["TransformerLens"] = lambda: bridge.run_with_cache(subject.ids)
    return runs, bare


def _check_alike(ours: Any, theirs: Any) -> None:
    """That both do the same work: the values in common are equal, but where scores are masked."""
    for key in (key for key in theirs if key in ours):
        off = torch.where(ours[key] < -1e30, 0, ours[key] - theirs[key]).abs().max()
        assert off < 1e-4, f"{key} is off by {off:.1e}"


def _eager_attention(subject: Subject) -> Run:
    """The attention of one layer alone, under eager, on what it is given in the model."""
    module = copy.deepcopy(subject.module)
    module.set_attn_implementation("eager")
    attention = module.transformer.h[LAYER].attn
    seen: list[tuple[Any, Any]] = []
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    module(input_ids=subject.ids, use_cache=False)
    hook.remove()
    args, kwargs = seen[0]
    return lambda: attention(*args, **kwargs)


def bridge_of(module: Any) -> Any:
    """TransformerLens' own model of the same weights; None where it is not installed."""
    try:
        from transformer_lens.model_bridge.sources import _bridge_builder as builder
    except ImportError:
        print("transformer-lens is not installed: pip install 'transformer-lens==4.3.*'")
        return None
    module = copy.deepcopy(module)
    module.set_attn_implementation("eager")  # which it needs, and sets when it loads a model
    name = type(module).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builder.build_bridge_from_module(
            module, name, hf_config=module.config, dtype=torch.float32, device="cpu"
        )


def _jobs(runs: dict[str, Run], bare: Run) -> dict[str, Job]:
    return {name: Job(Part(run, bare), Part(bare, bare)) for name, run in runs.items()}


def _report(title: str, timings: dict[str, Timing]) -> list[bool]:
    """Print the table; whether each bound holds."""
    base = quartiles(next(iter(timings.values())).base)[1]
    print(f"\n{title}: the bare model takes {1e3 * base:.2f} ms")
    print(f"{'more than it takes, ms':28s} {'quartile':>9s} {'median':>9s} {'quartile':>9s}")
    over = {name: timing.overhead(base) for name, timing in timings.items()}
    over["eager attention, one layer"] = timings["eager attention, one layer"].work
    for name, series in over.items():
        print(f"{name:28s}" + "".join(f" {1e3 * each:9.2f}" for each in quartiles(series)))
    asked = over["pattern of one layer"] - over["empty trace"]
    rows = [("pattern / eager attention", asked, "eager attention, one layer", OF_EAGER_ATTENTION)]
    if "TransformerLens" in over:
        everything = over["run_with_cache"]
        rows.append(("run_with_cache / theirs", everything, "TransformerLens", OF_TRANSFORMER_LENS))
    found = [(what, ratio(series, over[under]), bound) for what, series, under, bound in rows]
    for what, each, bound in found:
        holds = f"≤ {bound}: {'yes' if each.value <= bound else 'NO'}"
        print(f"{what:28s} {each.value:5.2f} ({each.low:.2f} to {each.high:.2f}), {holds}")
    return [each.value <= bound for _, each, bound in found]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cpu", action="store_true", help="count the process's own time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
