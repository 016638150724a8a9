"""What a trace costs beside plain PyTorch, nnsight and TransformerLens, as ratios within one run.

    python benchmarks/overhead.py [--model 64] [--rounds 200] [--cpu] [--json FILE]

An overhead is the median, over the rounds, of what a job took more than the bare model right before
it. Behind a ratio stands its 95 % interval; where that spans the bound, the verdict has a "?".
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for a checkout that is not installed

import torch  # noqa: E402
import transformers  # noqa: E402
from contenders import GENERATIONS, NEW_TOKENS, Contender, Work, agree, contenders  # noqa: E402
from other_bases import (  # noqa: E402
    INVOKE_BOUND,
    SCAN_BOUND,
    further_invokes,
    scan_to_fake_forward,
)
from subjects import READS, SUBJECTS, Subject  # noqa: E402
from timing import Clock, Estimate, Job, Part, Series, measure, quartiles, ratio  # noqa: E402
from versions import versions  # noqa: E402

IMPORT_BOUND = 0.15  # seconds
IMPORT_RUNS = 9
# Generations take 32 times as long as forwards: one round of them for so many; the least.
GENERATION_SHARE, GENERATION_ROUNDS = 5, 20

Key = tuple[str, Work]
Overheads = dict[Key, Series]  # what each takes more than the bare model, in seconds by round


@dataclass(frozen=True)
class Over:
    """What `who` takes for `work` more than the bare model, less what it takes for `less`."""

    who: str
    work: Work
    less: Work | None = None

    def of(self, overheads: Overheads) -> Series | None:
        """By round; None if somebody needed is not here."""
        keys = [(self.who, work) for work in (self.work, self.less) if work is not None]
        if any(key not in overheads for key in keys):
            return None
        first, *others = (overheads[key] for key in keys)
        return first - others[0] if others else first


@dataclass(frozen=True)
class Row:
    """A line of DESIGN.md section 7: `this` is at most `bound` times `that`."""

    work: str
    bound: float
    this: Over
    that: Over


ROWS = (
    Row("empty trace / nnsight", 0.25, Over("tracekit", Work.EMPTY), Over("nnsight", Work.EMPTY)),
    Row(
        "empty trace, Model / NNsight",
        0.25,
        Over("tracekit.Model", Work.EMPTY),
        Over("NNsight", Work.EMPTY),
    ),
    Row(
        "cache(12 modules) beyond the empty trace / hooks",
        1.3,
        Over("tracekit", Work.CACHE_12, less=Work.EMPTY),
        Over("hooks", Work.CACHE_12),
    ),
    Row(
        "cache() beyond the empty trace / hooks",
        1.3,
        Over("tracekit", Work.CACHE_ALL, less=Work.EMPTY),
        Over("hooks", Work.CACHE_ALL),
    ),
    Row(
        "cache(12 modules) with the trace / nnsight",
        0.4,
        Over("tracekit", Work.CACHE_12),
        Over("nnsight", Work.CACHE_12),
    ),
    Row(
        "cache() with the trace / nnsight",
        0.4,
        Over("tracekit", Work.CACHE_ALL),
        Over("nnsight", Work.CACHE_ALL),
    ),
    Row(
        "12 reads that are only stored / nnsight",
        0.5,
        Over("tracekit", Work.STORED),
        Over("nnsight", Work.STORED),
    ),
    Row(
        "48 reads that are only stored / nnsight",
        0.4,
        Over("tracekit", Work.MANY_STORED),
        Over("nnsight", Work.MANY_STORED),
    ),
    Row(
        "generate, cache of every layer, all of it / hooks",
        1.3,
        Over("tracekit", Work.GENERATE_CACHE),
        Over("hooks", Work.GENERATE_CACHE),
    ),
    Row(
        "generate, the same beyond the empty trace / hooks",
        1.3,
        Over("tracekit", Work.GENERATE_CACHE, less=Work.GENERATE_EMPTY),
        Over("hooks", Work.GENERATE_CACHE),
    ),
)
SCAN = "scan with one read / bare forward on fake tensors"
OUTSIDE = "a wrapped model outside a trace / bare"


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    clock: Clock = time.process_time if options.cpu else time.perf_counter
    report: dict[str, Any] = {"versions": versions(), "clock": clock.__name__, "models": {}}
    print(f"{versions()}\nclock: {clock.__name__}, torch on one thread")
    for name in options.model:
        with torch.no_grad():
            subject = SUBJECTS[name]()
            report["models"][name] = _compare(subject, options.rounds, clock, options.forwards)
    report["import"] = _print_imports()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(SUBJECTS)
    parser.add_argument("--model", choices=names, action="append", help="default: all of them")
    parser.add_argument("--rounds", type=int, default=200, help="of forwards (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    forwards = "leave out the generations, which take most of the time"
    parser.add_argument("--forwards", action="store_true", help=forwards)
    cpu = "count the time on the processor: less noise, but no waits between threads (live reads)"
    parser.add_argument("--cpu", action="store_true", help=cpu)
    options = parser.parse_args()
    options.model = options.model or names
    return options


# -- one model ------------------------------------------------------------------------------------


def _compare(subject: Subject, rounds: int, clock: Clock, forwards_only: bool) -> dict[str, Any]:
    everybody, absent = contenders(subject)
    agree(subject, everybody)
    rare = 0 if forwards_only else max(GENERATION_ROUNDS, rounds // GENERATION_SHARE)
    forwards, usual_forward = _measure(everybody, Work.FORWARD, rounds, clock)
    generations, usual_generation = (
        _measure(everybody, Work.GENERATE, rare, clock) if rare else ({}, math.nan)
    )
    overheads = forwards | generations
    print(f"\n{subject.title}: {rounds} rounds of forwards, {rare} of generations")
    for line in absent:
        print(f"  {line}")
    print(f"  bare: forward {1e3 * usual_forward:.3f} ms")
    if rare:
        print(f"  bare: generation of {NEW_TOKENS} tokens {1e3 * usual_generation:.1f} ms")
    return {
        "bare": {"forward": usual_forward, "generation": usual_generation if rare else None},
        "overheads": _print_overheads(overheads),
        "rows": [
            _print_outside(overheads, usual_forward),
            *_print_rows(overheads),
            _print_row(SCAN, SCAN_BOUND, scan_to_fake_forward(subject, rounds, clock)),
        ],
        "invokes": _print_invokes(further_invokes(subject, rounds, clock)),
        "each": _print_each(overheads, len(subject.layers) * NEW_TOKENS),
    }


def _measure(
    everybody: list[Contender], base: Work, rounds: int, clock: Clock
) -> tuple[Overheads, float]:
    """The overheads over `base`, and what that usually takes bare."""
    is_generation = base in GENERATIONS
    bare = everybody[0]
    under = Part(bare.works[base], bare.warm)
    jobs = {
        (contender.name, work): Job(Part(run, contender.warm), under)
        for contender in everybody
        for work, run in contender.works.items()
        if (work in GENERATIONS) is is_generation
    }
    timings = measure(jobs, rounds, clock)
    usual = median(float(second) for timing in timings.values() for second in timing.base)
    return {key: timing.overhead(usual) for key, timing in timings.items()}, usual


def _print_overheads(overheads: Overheads) -> list[dict[str, Any]]:
    print("\n  milliseconds more than bare: median [quartiles]")
    told: list[dict[str, Any]] = []
    for work in Work:
        for (who, what), series in overheads.items():
            if what is not work:
                continue
            low, middle, high = quartiles(series)
            print(
                f"  {work.value:<28} {who:<16} "
                f"{1e3 * middle:8.3f}  [{1e3 * low:8.3f}, {1e3 * high:8.3f}]"
            )
            told.append(
                {"work": work.value, "who": who, "low": low, "median": middle, "high": high}
            )
    return told


def _print_outside(overheads: Overheads, usual: float) -> dict[str, Any]:
    print(f"\n  {'ratio':<50} must be  measured  [95 %]")
    times = overheads["tracekit", Work.FORWARD] + usual
    return _print_row(OUTSIDE, 1.00, ratio(times, overheads["bare", Work.FORWARD] + usual))


def _print_rows(overheads: Overheads) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for row in ROWS:
        this, that = row.this.of(overheads), row.that.of(overheads)
        if this is None or that is None:
            print(f"  {row.work:<50} ≤ {row.bound:4.2f}   not measured")
            continue
        told.append(_print_row(row.work, row.bound, ratio(this, that)))
    return told


def _print_row(work: str, bound: float, found: Estimate) -> dict[str, Any]:
    verdict = "ok" if round(found.value, 2) <= bound else "MISSED"
    if found.low <= bound < found.high:
        verdict += "?"
    print(
        f"  {work:<50} ≤ {bound:4.2f}   {found.value:6.3f}    "
        f"[{found.low:.3f}, {found.high:.3f}]  {verdict}"
    )
    return {"row": work, "bound": bound, "verdict": verdict} | asdict(found)


def _print_invokes(further: dict[str, Series]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for who, series in further.items():
        low, middle, high = quartiles(series)
        verdict = ""
        if who == "tracekit":
            met = "ok" if round(middle, 5) <= INVOKE_BOUND else "MISSED"
            verdict = f"  ≤ {1e3 * INVOKE_BOUND:.1f}  {met}"
        print(
            f"  each further invoke with a stored read, ms: {who} "
            f"{1e3 * middle:.3f} [{1e3 * low:.3f}, {1e3 * high:.3f}]{verdict}"
        )
        told.append({"who": who, "low": low, "median": middle, "high": high})
    return told


def _print_each(overheads: Overheads, visits: int) -> list[dict[str, Any]]:
    """What has no bound: the cost of each of several."""
    told: list[dict[str, Any]] = []
    for what, work, less, count in (
        ("each live read", Work.READS, Work.READ, READS - 1),
        ("each visit of a generation with a cache", Work.GENERATE_CACHE, None, visits),
    ):
        parts: list[str] = []
        for who in ("hooks", "tracekit", "nnsight"):
            series = Over(who, work, less).of(overheads)
            if series is None:
                continue
            low, middle, high = (1e6 * second / count for second in quartiles(series))
            parts.append(f"{who} {middle:.1f} [{low:.1f}, {high:.1f}]")
            told.append({"what": what, "who": who, "low": low, "median": middle, "high": high})
        if parts:
            print(f"  {what}, µs: {'; '.join(parts)}")
    return told


# -- importing ------------------------------------------------------------------------------------

_IMPORTS = {
    "import tracekit": "import tracekit",
    "from tracekit import LanguageModel": "from tracekit import LanguageModel",
    "import transformers": "import transformers",
    "import nnsight": "import nnsight",
    "import transformer_lens": "import transformer_lens",
}


def _print_imports() -> dict[str, float]:
    print("\nseconds beyond `import torch`, in a process of its own")
    told: dict[str, float] = {}
    for what, statement in _IMPORTS.items():
        seconds = [_seconds_to(statement) for _ in range(IMPORT_RUNS)]
        known = [second for second in seconds if second is not None]
        if not known:
            print(f"  {what:<40} not installed")
            continue
        told[what] = median(known)
        verdict = ""
        if what == "import tracekit":
            verdict = f"≤ {IMPORT_BOUND}  {'ok' if told[what] <= IMPORT_BOUND else 'MISSED'}"
        print(f"  {what:<40} {told[what]:.3f}  {verdict}")
    return told


def _seconds_to(statement: str) -> float | None:
    code = (
        f"import sys, time, torch; sys.path.insert(0, {str(ROOT)!r}); "
        f"start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    main()
