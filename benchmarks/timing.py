"""Time jobs side by side in interleaved rounds, and compare what each takes more than a base."""

# Guarantees:
#   - every job runs once in every round, in an order shuffled for each round, so that a machine
#     that slows down slows all of them;
#   - right before a job its base is timed, and the two are compared: the speed of a shared machine
#     changes by a factor of two, several times a second;
#   - each runs on a processor whose caches hold its own model, and what it returns is dropped
#     within its own timed call.

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]  # seconds
Series = NDArray[np.float64]  # one number for each round, in seconds

WARM_RUNS = 2  # after one, the next plain forward of a small model is still 2 % faster
BOOTSTRAPS = 400  # resamplings of the rounds; the interval's ends then move by a few per cent


@dataclass(frozen=True)
class Part:
    """What is timed, and what is run before it, untimed."""

    run: Callable[[], object]
    warm: Callable[[], object]


@dataclass(frozen=True)
class Job:
    """A piece of work, and what it is compared with."""

    work: Part
    base: Part


@dataclass(frozen=True)
class Timing:
    """Seconds, by round."""

    work: Series
    base: Series

    def overhead(self, usual: float) -> Series:
        """What the work took more than its base, at the speed at which a base takes `usual`."""
        return (self.work / self.base - 1) * usual


@dataclass(frozen=True)
class Estimate:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


def measure(jobs: Mapping[Key, Job], rounds: int, clock: Clock, seed: int = 0) -> dict[Key, Timing]:
    """Time every job and its base in every round."""
    for job in jobs.values():  # the first runs compile blocks, start threads, learn habits
        for _ in range(3):
            job.work.run()
    order = list(jobs)
    shuffle = random.Random(seed).shuffle
    work: dict[Key, list[float]] = {key: [] for key in jobs}
    base: dict[Key, list[float]] = {key: [] for key in jobs}
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            base[key].append(_timed(jobs[key].base, clock))
            work[key].append(_timed(jobs[key].work, clock))
    return {key: Timing(np.array(work[key]), np.array(base[key])) for key in jobs}


def _timed(part: Part, clock: Clock) -> float:
    for _ in range(WARM_RUNS):
        part.warm()
    start = clock()
    result = part.run()
    del result
    return clock() - start


def quartiles(series: Series) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = np.percentile(series, [25, 50, 75])
    return float(low), float(middle), float(high)


def ratio(over: Series, under: Series) -> Estimate:
    """median(over) / median(under); resamples the rounds, which both share, for the interval."""
    rounds = len(over)
    picks = np.random.default_rng(0).integers(0, rounds, (BOOTSTRAPS, rounds))
    ratios = np.median(over[picks], axis=1) / np.median(under[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(np.median(over) / np.median(under)), float(low), float(high))
