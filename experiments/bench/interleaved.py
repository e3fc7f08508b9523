"""Timing of alternatives in turn, in one process: what disturbs the machine disturbs all of them alike.

A ratio is taken within each round and its median reported with the 20th and 80th percentile over rounds, so that it
means the same on a quiet machine and a busy one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Timing:
    """One alternative.

    Attributes:
        seconds: median of a call.
        ratio: how many times faster than the base of the same round: median.
        low: 20th percentile of that.
        high: 80th percentile.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def interleave(calls: Mapping[str, Callable[[], object]], base: str, budget: float) -> dict[str, Timing]:
    """Time ``calls`` in turn for about ``budget`` seconds.

    Args:
        calls: by name; each does the same work every time it is called.
        base: the one that the others are compared with.
        budget: seconds in all, warming up apart; at least 5 rounds and at most 200 are run.
    """
    for call in calls.values():
        call()
    first = {name: _seconds(call) for name, call in calls.items()}
    rounds = int(np.clip(budget / max(sum(first.values()), 1e-9), MIN_ROUNDS, MAX_ROUNDS))
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        # Another order every round: nobody always runs after the one that empties the cache.
        for name in np.roll(names, number):
            found[name].append(_seconds(calls[name]))
    times = {name: np.array(values) for name, values in found.items()}
    return {name: _timing(values, times[base]) for name, values in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _timing(values: np.ndarray, base: np.ndarray) -> Timing:
    ratios = base / values
    low, high = np.quantile(ratios, [0.2, 0.8])
    return Timing(float(np.median(values)), float(np.median(ratios)), float(low), float(high))
