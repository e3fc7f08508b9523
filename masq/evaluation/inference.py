"""Intervals and tests on plain numbers and arrays: closed forms for shares, bootstrap and permutations for the rest.

Shapes: U units (independent samples or clusters), R resamples, K columns. Everything random is seeded, so that the same
numbers give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

# So many units that differ, or fewer, are exchanged in every way there is (16,384 at most) instead of at random.
MAX_ENUMERATED = 14
_SEED = 0
# Random draws that exist at one time: 8 MiB as int64.
_DRAWS_PER_CHUNK = 1 << 20
_NORMAL = NormalDist()

Interval = tuple[float, float]


def wilson(share: float, size: float, level: float) -> Interval:
    """Wilson's score interval of a share (JASA 22, 1927).

    Args:
        share: of successes.
        size: number of independent samples, not necessarily whole.
        level: of confidence.

    Returns:
        Lower and upper end, within [0, 1].
    """
    z = _NORMAL.inv_cdf((1 + level) / 2)
    centre, shrink = share + z * z / (2 * size), 1 + z * z / size
    half = z * math.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    # The end of a share of 0 or 1 is that share; rounding must not miss it.
    return (
        0.0 if share == 0 else max(0.0, (centre - half) / shrink),
        1.0 if share == 1 else min(1.0, (centre + half) / shrink),
    )


def bonett_price(gained: float, lost: float, size: float, level: float) -> Interval:
    """Interval of the difference of two shares of the same samples (Bonett and Price, 2012).

    It is Wald's after one sample is added to either kind of change.

    Args:
        gained: samples with success in the second share only.
        lost: samples with success in the first share only.
        size: number of independent samples, not necessarily whole.
        level: of confidence.

    Returns:
        Lower and upper end of (gained - lost) / size in the population, within [-1, 1].
    """
    up, down = (gained + 1) / (size + 2), (lost + 1) / (size + 2)
    half = _NORMAL.inv_cdf((1 + level) / 2) * math.sqrt((up + down - (up - down) ** 2) / (size + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar(lost: int, gained: int) -> float:
    """p-value of the exact two-sided McNemar test: an answer that flipped is as likely to be lost as to be gained."""
    total, fewer = lost + gained, min(lost, gained)
    # Whole numbers of any size: nothing is rounded before the division.
    ways = term = 1
    for k in range(fewer):
        term = term * (total - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**total)


def resampled_sums(columns: np.ndarray, num_resamples: int) -> np.ndarray:
    """Sums over units drawn with replacement, as many as there are.

    Args:
        columns: float64 [U, K].
        num_resamples: R.

    Returns:
        float64 [R, K].
    """
    generator, size = np.random.default_rng(_SEED), len(columns)
    sums = []
    for count in _chunks(num_resamples, size):
        # How often each resample holds each unit: a product with it is faster than gathering the units.
        drawn = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        sums.append(times.astype(float) @ columns)
    return np.concatenate(sums)


def bca(replicates: np.ndarray, observed: float, influence: np.ndarray, level: float) -> Interval:
    """Bias-corrected and accelerated bootstrap interval (Efron and Tibshirani 1993, section 14.3).

    Args:
        replicates: the statistic in each resample, [R].
        observed: the statistic in the sample.
        influence: empirical influence of every unit on it up to a factor, [U], not all 0. The acceleration comes from
            it; the book's jackknife approximates the same.
        level: of confidence.

    Returns:
        Lower and upper end, within the range of the replicates.
    """
    # Sums in another order differ in the last bits. Half of what equals the observed value counts as below it.
    same = np.abs(replicates - observed) <= 1e-12 * np.abs(replicates).max()
    below = np.mean((replicates < observed) & ~same) + np.mean(same) / 2
    room = 1 / (len(replicates) + 1)
    bias = _NORMAL.inv_cdf(min(max(float(below), room), 1 - room))
    # Scaled first, so that no power overflows.
    scaled = influence / np.abs(influence).max()
    acceleration = float((scaled**3).sum() / (6 * (scaled**2).sum() ** 1.5))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        # At extreme levels the denominator can pass 0; the wanted quantile is the last one long before.
        ends.append(_NORMAL.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-9)))
    low, high = np.quantile(replicates, ends)
    return float(low), float(high)


def sign_flip(pairs: np.ndarray, num_permutations: int) -> float:
    """p-value of the paired permutation test that exchanges first and second unit by unit.

    The statistic is the absolute difference of the two ratios of sums. Units that differ are exchanged in every way if
    there are at most ``MAX_ENUMERATED``; otherwise at random, and the observed arrangement counts too (Phipson and
    Smyth, SAGMB 9, 2010).

    Args:
        pairs: float64 [U, 4]: numerator and denominator of the first, then of the second.
        num_permutations: random ones.

    Returns:
        Share of arrangements at least as extreme as the observed one.
    """
    moves = pairs[:, 2:] - pairs[:, :2]
    moves = moves[moves.any(1)]
    first, second = pairs[:, :2].sum(0), pairs[:, 2:].sum(0)

    def distance(exchanged: np.ndarray) -> np.ndarray:
        moved = exchanged.astype(float) @ moves
        left, right = first + moved, second - moved
        return np.abs(right[:, 0] / right[:, 1] - left[:, 0] / left[:, 1])

    # Equal differences may be summed in different orders.
    observed = distance(np.zeros((1, len(moves))))[0] * (1 - 1e-9)
    if len(moves) <= MAX_ENUMERATED:
        every = np.arange(2 ** len(moves))[:, None] >> np.arange(len(moves)) & 1
        return float(np.mean(distance(every) >= observed))
    generator = np.random.default_rng(_SEED)
    extreme = sum(
        int((distance(generator.integers(2, size=(count, len(moves)), dtype=np.uint8)) >= observed).sum())
        for count in _chunks(num_permutations, len(moves))
    )
    return (1 + extreme) / (1 + num_permutations)


def _chunks(count: int, size: int) -> Iterator[int]:
    """``count`` rows of ``size`` draws in chunks that fit into memory."""
    rows = max(1, _DRAWS_PER_CHUNK // size)
    yield from (min(rows, count - start) for start in range(0, count, rows))
