"""What it costs to capture twelve layers while generating, beside hand-written hooks and nnsight.

    python benchmarks/generation.py [--rounds 40] [--cpu] [--json FILE]

Each job is timed right behind what it is compared with: a cache behind the same trace without one,
hooks behind the plain `generate`, a whole run behind a whole run of hand-written hooks. The ratios
are of medians over the rounds; behind each stands its 95 % interval, and where that spans the
bound, the verdict has a "?".
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
from live_bytes import peak_of  # noqa: E402
from subjects import Subject, random_subject  # noqa: E402
from timing import Clock, Estimate, Job, Part, Series, Timing, measure, quartiles, ratio  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from versions import versions  # noqa: E402

from tracekit import LanguageModel  # noqa: E402

PROMPT_TOKENS, NEW_TOKENS = 16, 64
WIDTH, WIDE = 64, 768  # of what is timed: small, so that overheads show; of what is weighed
BEAMS = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """`found` must be at most `bound`; without one it is only told."""

    what: str
    bound: float | None
    found: Estimate

    @property
    def verdict(self) -> str:
        """ "ok" or "MISSED", with a "?" where the interval spans the bound."""
        if self.bound is None:
            return ""
        verdict = "ok" if round(self.found.value, 2) <= self.bound else "MISSED"
        return verdict + "?" * (self.found.low <= self.bound < self.found.high)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    clock: Clock = time.process_time if options.cpu else time.perf_counter
    print(f"{versions()}\nclock: {clock.__name__}, torch on one thread")
    with torch.no_grad():
        subject = random_subject(WIDTH, PROMPT_TOKENS)
        parts = _parts(subject)
        _agree(subject, {name: part.run for name, part in parts.items()})
        timed, costs = _timed(subject, parts, options.rounds, clock)
        rows = [*timed, *_weighed()]
    _print_rows(rows)
    if options.json:
        told = [asdict(row) | {"verdict": row.verdict} for row in rows]
        report = {"versions": versions(), "clock": clock.__name__, "rows": told, "costs": costs}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="of generations (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--cpu", action="store_true", help="count the time on the processor")
    return parser.parse_args()


# -- what runs ------------------------------------------------------------------------------------


def _parts(subject: Subject) -> dict[str, Part]:
    module, ids = subject.module, subject.ids
    layers = [module.get_submodule(path) for path in subject.layers]
    plain = partial(_generate, module, ids)
    model = LanguageModel(module, tokenizer=subject.tokenizer)
    blocks = list(model.transformer.h)
    runs: dict[str, Run] = {
        "plain": plain,
        "hooks": partial(_hooked, layers, plain),
        "hooks, joined": partial(_hooked_and_joined, layers, plain),
        "tracekit, empty": partial(_empty, model, ids),
        "tracekit": partial(_cache, model, ids, blocks),
        "tracekit, sequences": partial(_sequences, model, ids, blocks),
    }
    warm = partial(module, input_ids=ids)
    return {name: Part(run, warm) for name, run in runs.items()} | _rivals(subject)


def _rivals(subject: Subject) -> dict[str, Part]:
    try:
        from nnsight import TransformersModel
    except ImportError as error:
        print(f"nnsight is left out: {error}")
        return {}
    own = subject.copied()  # it replaces every module's forward
    model = TransformersModel(own.module, tokenizer=own.tokenizer)
    blocks = list(model.transformer.h)
    warm = partial(own.module, input_ids=own.ids)
    return {
        "nnsight, empty": Part(partial(_empty, model, own.ids), warm),
        "nnsight": Part(partial(_cache, model, own.ids, blocks), warm),
    }


def _generate(module: Any, ids: Tensor) -> Tensor:
    return module.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)


def _hooked(parts: list[nn.Module], run: Run) -> list[list[Tensor]]:
    """By hand: detached, on the CPU, one list for each layer."""
    kept: list[list[Tensor]] = [[] for _ in parts]

    def keep_in(outputs: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            outputs.append(value.detach().cpu())

        return hook

    pairs = zip(parts, kept, strict=True)
    handles = [part.register_forward_hook(keep_in(outputs)) for part, outputs in pairs]
    run()
    for handle in handles:
        handle.remove()
    return kept


def _hooked_and_joined(parts: list[nn.Module], run: Run) -> list[Tensor]:
    return [torch.cat(outputs, 1) for outputs in _hooked(parts, run)]


# The first two serve tracekit and nnsight, as the syntax is the same.


def _empty(model: Any, ids: Tensor) -> None:
    with model.generate(ids, **OPTIONS):
        pass


def _cache(model: Any, ids: Tensor, blocks: list[Any]) -> Any:
    with model.generate(ids, **OPTIONS) as tracer:
        cache = tracer.cache(modules=blocks)
    return cache  # noqa: RET504 - the name is what the block hands back


def _sequences(model: Any, ids: Tensor, blocks: list[Any]) -> list[Tensor]:
    cache = _cache(model, ids, blocks)
    return [cache.sequence(block) for block in blocks]


# -- the same work? -------------------------------------------------------------------------------


def _agree(subject: Subject, runs: dict[str, Run]) -> None:
    """Check that all keep what the hooks keep; AssertionError if one does not."""
    by_hand, joined = runs["hooks"](), runs["hooks, joined"]()
    assert all(len(outputs) == NEW_TOKENS for outputs in by_hand)
    _check("tracekit, sequences", runs["tracekit, sequences"](), joined)
    kept = runs["tracekit"]()
    for path, outputs in zip(subject.layers, by_hand, strict=True):
        _check(f"tracekit, {path}", kept[path].outputs, outputs)
    if "nnsight" in runs:
        kept = runs["nnsight"]()
        for path, outputs in zip(subject.layers, by_hand, strict=True):
            _check(f"nnsight, {path}", kept[f"model.{path}"].output, outputs)


def _check(who: str, found: list[Tensor], expected: list[Tensor]) -> None:
    pairs = zip(found, expected, strict=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs), who


# -- time -----------------------------------------------------------------------------------------

# What is timed, and what right before it.
PAIRS = (
    ("hooks", "plain"),
    ("tracekit, empty", "plain"),
    ("tracekit", "tracekit, empty"),
    ("tracekit, sequences", "hooks"),
    ("tracekit, sequences", "hooks, joined"),
    ("nnsight, empty", "plain"),
    ("nnsight", "nnsight, empty"),
)


def _timed(
    subject: Subject, parts: dict[str, Part], rounds: int, clock: Clock
) -> tuple[list[Row], dict[str, tuple[float, float, float]]]:
    jobs = {(work, base): Job(parts[work], parts[base]) for work, base in PAIRS if work in parts}
    timings = measure(jobs, rounds, clock)
    usual = quartiles(timings["hooks", "plain"].base)[1]
    more = {pair: timing.overhead(usual) for pair, timing in timings.items()}
    costs = _print_costs(subject, more, usual, rounds)
    return [*_rows_of_visits(more), *_rows_of_runs(timings)], costs


def _rows_of_visits(more: dict[tuple[str, str], Series]) -> list[Row]:
    cached = more["tracekit", "tracekit, empty"]
    by_hand = more["hooks", "plain"]
    rows = [Row("a visit: cache beyond the empty trace / hooks", 1.3, ratio(cached, by_hand))]
    if ("nnsight", "nnsight, empty") in more:
        theirs = more["nnsight", "nnsight, empty"]
        ours_whole = cached + more["tracekit, empty", "plain"]
        theirs_whole = theirs + more["nnsight, empty", "plain"]
        rows += [
            Row("a visit: cache beyond the empty trace / nnsight", 0.35, ratio(cached, theirs)),
            Row("a visit: trace and cache / nnsight", 0.35, ratio(ours_whole, theirs_whole)),
            Row("a visit: hooks / trace and cache of nnsight", None, ratio(by_hand, theirs_whole)),
        ]
    return rows


def _rows_of_runs(timings: dict[tuple[str, str], Timing]) -> list[Row]:
    rows: list[Row] = []
    for what, base, bound in (
        ("all of it, with sequences / hooks that fill lists", "hooks", 1.05),
        ("all of it, with sequences / hooks and torch.cat", "hooks, joined", None),
    ):
        timing = timings["tracekit, sequences", base]
        rows.append(Row(what, bound, ratio(timing.work, timing.base)))
    return rows


def _print_costs(
    subject: Subject, more: dict[tuple[str, str], Series], usual: float, rounds: int
) -> dict[str, tuple[float, float, float]]:
    visits = len(subject.layers) * NEW_TOKENS
    print(f"\n{subject.title}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {rounds} rounds")
    print(f"  plain generate {1e3 * usual:.1f} ms; more than that, in ms [quartiles], and by visit")
    costs: dict[str, tuple[float, float, float]] = {}
    for (work, base), series in more.items():
        low, middle, high = quartiles(series)
        costs[f"{work} beyond {base}"] = (low, middle, high)
        told = f"{work} beyond {base}"
        print(
            f"  {told:<42} {1e3 * middle:7.2f} [{1e3 * low:.2f}, {1e3 * high:.2f}]"
            f"   {1e6 * middle / visits:6.1f} µs"
        )
    return costs


# -- memory ---------------------------------------------------------------------------------------


def _weighed() -> list[Row]:
    """The most that is alive while a sequence is made, beside the steps, in copies of it."""
    subject = random_subject(WIDE, PROMPT_TOKENS)
    model = LanguageModel(subject.module, tokenizer=subject.tokenizer)
    rows: list[Row] = []
    for what, options in (("greedy", {}), (f"{BEAMS} beams", {"num_beams": BEAMS})):
        with model.generate(subject.ids, **OPTIONS, **options) as tracer:
            cache = tracer.cache(modules=[model.transformer.h[6]])
        peak, made = peak_of(partial(cache.sequence, "transformer.h.6"))
        labels = sum(each.nbytes for each in (made.tokens, made.positions, made.valid))
        copies = peak / (made.nbytes + labels)
        rows.append(Row(f"memory of a sequence, {what}: copies", 1.0, Estimate(*[copies] * 3)))
    return rows


# -- the table ------------------------------------------------------------------------------------


def _print_rows(rows: list[Row]) -> None:
    print(f"\n  {'ratio':<50} must be  measured  [95 %]")
    for row in rows:
        bound = "      " if row.bound is None else f"≤ {row.bound:4.2f}"
        found = row.found
        print(
            f"  {row.what:<50} {bound}   {found.value:6.3f}    "
            f"[{found.low:.3f}, {found.high:.3f}]  {row.verdict}"
        )


if __name__ == "__main__":
    main()
