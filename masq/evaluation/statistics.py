"""Values, standard errors, intervals and paired comparisons, all from the outcomes of samples (`Outcomes`).

What is resampled and flipped are *units*: clusters where outcomes name them, else samples.

Intervals. Independent right or wrong answers have closed forms, because their distribution is known: Wilson's for a
share (recommended by Brown, Cai and DasGupta, Statistical Science 16, 2001) and Bonett and Price's for the difference
of two shares of the same samples (Statistics in Medicine 31, 2012; recommended by Fagerland, Lydersen and Laake,
Statistics in Medicine 33, 2014). A bootstrap is no substitute: if 3 % of the answers are lost and none is gained, a
percentile interval at 95 % covers that in 71 % of all sets of 40 samples and in 88 % of all sets of 120, and where
every answer is right it has no width at all. Everything else gets a seeded BCa bootstrap over units (Efron, JASA 82,
1987): word errors are skewed, where BCa covers better than percentiles. Coverage is held by
tests/evaluation/test_statistics.py.

Tests. p-values come from tests that are exact under their null hypothesis, not from the interval, and so the two can
disagree at the margin.

scipy is not needed, for masq does not require it; the tests hold these functions against it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from masq.errors import ConfigError, DataError
from masq.evaluation.inference import Interval, bca, bonett_price, mcnemar, resampled_sums, sign_flip, wilson
from masq.evaluation.outcomes import Outcomes

LEVEL = 0.95
# Adjusted p-values below it are called significant.
SIGNIFICANCE = 0.05
NUM_RESAMPLES = 2000
# The smallest p is 1 in 20,000: it stays below 0.05 after a correction over 999 comparisons.
NUM_PERMUTATIONS = 19_999
# exp() of more is no float64 any longer.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class Flips:
    """Answers that differ between two runs.

    Attributes:
        lost: right in the base, wrong in the other.
        gained: wrong in the base, right in the other.
        changed: other answers with the same score; None where outcomes hold no answers.
    """

    lost: int
    gained: int
    changed: int | None


@dataclass(frozen=True)
class Comparison:
    """What changed from a base to another run on the same samples.

    Attributes:
        difference: value of the other minus value of the base.
        interval: of the difference; None where the samples do not tell how it varies (one sample, or no difference in
            any of them, for a metric that is no share).
        p_value: two-sided, of the hypothesis that the runs are interchangeable.
        test: "mcnemar" for independent right or wrong answers, else "sign_flip".
        flips: None for metrics other than right or wrong.
        n: number of samples.
    """

    difference: float
    interval: Interval | None
    p_value: float
    test: Literal["mcnemar", "sign_flip"]
    flips: Flips | None
    n: int


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """Ratio of two sums over samples, and its standard error by linearisation.

    With R the ratio, the error is sqrt(n / (n - 1) sum_i (a_i - R b_i)^2) / sum_i b_i (Cochran, Sampling Techniques,
    ratio estimators).

    Args:
        numerators: a_i.
        denominators: b_i, their sum positive.

    Returns:
        R and its standard error, None for a single sample.
    """
    total = math.fsum(denominators)
    value = math.fsum(numerators) / total
    n = len(numerators)
    if n < 2:
        return value, None
    squares = math.fsum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return value, math.sqrt(n / (n - 1) * squares) / total


def value(outcomes: Outcomes) -> float:
    """The metric; infinite where a perplexity is no float64 any longer."""
    return _transformed(math.fsum(outcomes.numerators) / math.fsum(outcomes.counts), outcomes.transform)


def standard_error(outcomes: Outcomes) -> float | None:
    """Standard error of the value over units by linearisation (`ratio`), and by the delta method for a perplexity.

    For right or wrong answers it is sqrt(p (1 - p) / (n - 1)); for clusters it is the cluster-robust error.

    Returns:
        In units of the value; None for a single unit.
    """
    numerators, denominators = _units(outcomes).T.tolist()
    mean, error = ratio(numerators, denominators)
    if error is None or outcomes.transform == "identity":
        return error
    scale = _transformed(mean, outcomes.transform)
    return scale * error if math.isfinite(scale) else math.inf


def interval(outcomes: Outcomes, level: float = LEVEL, *, num_resamples: int = NUM_RESAMPLES) -> Interval | None:
    """Confidence interval of the value.

    Wilson's for independent right or wrong answers; a BCa bootstrap over units otherwise. Where all units are wholly
    right or wholly wrong a bootstrap has no width, and the interval is Wilson's with units for samples (as many as
    equally large ones would be worth): of a share, and of a word error rate as if an utterance failed as a whole.

    Args:
        outcomes: of one metric.
        level: probability that intervals made like this cover the true value.
        num_resamples: of the bootstrap, seeded.

    Returns:
        Lower and upper end; None where the samples do not tell how the value varies.

    Raises:
        ConfigError: a level outside of (0, 1).
    """
    _check_level(level)
    if outcomes.is_binary and not outcomes.is_clustered:
        return wilson(value(outcomes), outcomes.n, level)
    units = _units(outcomes)
    numerators, denominators = units.T
    mean = numerators.sum() / denominators.sum()
    influence = numerators - mean * denominators
    if _is_constant(influence, numerators):
        is_share = outcomes.transform == "identity" and _are_shares(units) and mean in (0, 1)
        return wilson(float(mean), _effective_size(denominators), level) if is_share else None
    sums = resampled_sums(units, num_resamples)
    low, high = bca(sums[:, 0] / sums[:, 1], mean, influence, level)
    return _transformed(low, outcomes.transform), _transformed(high, outcomes.transform)


def paired(
    base: Outcomes,
    other: Outcomes,
    level: float = LEVEL,
    *,
    num_resamples: int = NUM_RESAMPLES,
    num_permutations: int = NUM_PERMUTATIONS,
) -> Comparison:
    """Compare two runs on the same samples.

    Independent right or wrong answers get Bonett and Price's interval and the exact McNemar test. Anything else gets a
    BCa bootstrap in which both runs are resampled together, and a permutation test that exchanges the runs unit by
    unit: in every way if few units differ, else at random, where p counts the observed arrangement too (Phipson and
    Smyth, SAGMB 9, 2010). The test looks at the ratio, the logarithm of a perplexity.

    Args:
        base: what is compared with.
        other: what is compared.
        level: of the interval.
        num_resamples: of the bootstrap, seeded.
        num_permutations: random ones, seeded.

    Raises:
        DataError: outcomes of different metrics or samples.
        ConfigError: a level outside of (0, 1).
    """
    _check_level(level)
    _check_pair(base, other)
    flips = _flips(base, other) if base.is_binary and other.is_binary else None
    difference = value(other) - value(base)
    if flips is not None and not base.is_clustered:
        up, down = (flips.gained, flips.lost) if base.higher_is_better else (flips.lost, flips.gained)
        found = bonett_price(up, down, base.n, level)
        return Comparison(difference, found, mcnemar(flips.lost, flips.gained), "mcnemar", flips, base.n)
    pairs = np.hstack([_units(base, keep_empty=True), _units(other, keep_empty=True)])
    pairs = pairs[(pairs[:, 1] > 0) | (pairs[:, 3] > 0)]
    found = _difference_interval(pairs, base.transform, level, num_resamples)
    return Comparison(difference, found, sign_flip(pairs, num_permutations), "sign_flip", flips, base.n)


def adjust(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    Every mark in a table is read as a claim of its own, so the chance of a single false one in the table is what is
    bounded; and methods that share a base and metrics that share samples depend on each other in unknown ways, which
    Holm allows and Benjamini and Hochberg's false discovery rate does not.

    Args:
        p_values: of all comparisons shown.

    Returns:
        Adjusted values in the same order, at most 1: a comparison is significant where its own is below the level.

    Raises:
        DataError: a value outside of [0, 1].
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise DataError("p-values must lie between 0 and 1", value=wrong[0])
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    scaled = [(len(order) - rank) * p_values[index] for rank, index in enumerate(order)]
    stepped = itertools.accumulate((min(1.0, p) for p in scaled), max)
    by_index = dict(zip(order, stepped, strict=True))
    return [by_index[index] for index in range(len(p_values))]


def _transformed(mean: float, transform: str) -> float:
    if transform == "identity":
        return float(mean)
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


def _units(outcomes: Outcomes, *, keep_empty: bool = False) -> np.ndarray:
    """Numerator and denominator [U, 2] of every cluster or sample that has a denominator, or of every one."""
    columns = np.array([outcomes.numerators, outcomes.counts])
    if outcomes.groups is not None:
        numbers = np.unique(outcomes.groups, return_inverse=True)[1]
        columns = np.array([np.bincount(numbers, weights=column) for column in columns])
    return columns.T if keep_empty else columns.T[columns[1] > 0]


def _difference_interval(pairs: np.ndarray, transform: str, level: float, num_resamples: int) -> Interval | None:
    """Interval of the difference of two values from units [U, 4]: numerator and denominator of base and other."""
    apply = np.exp if transform == "exp" else np.asarray
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sums = resampled_sums(pairs, num_resamples)
        replicates = apply(sums[:, 2] / sums[:, 3]) - apply(sums[:, 0] / sums[:, 1])
        means = pairs.sum(0)[[0, 2]] / pairs.sum(0)[[1, 3]]
        slopes = apply(means) if transform == "exp" else np.ones(2)
        parts = (pairs[:, [0, 2]] - means * pairs[:, [1, 3]]) * slopes / pairs.sum(0)[[1, 3]]
        influence, observed = parts[:, 1] - parts[:, 0], float(apply(means[1]) - apply(means[0]))
    if not (np.isfinite(replicates).all() and np.isfinite(influence).all()):
        return None
    if _is_constant(influence, parts):
        is_share = transform == "identity" and _are_shares(pairs) and observed in (-1, 0, 1)
        size = _effective_size(pairs[:, 1])
        return bonett_price(size * (observed > 0), size * (observed < 0), size, level) if is_share else None
    return bca(replicates, observed, influence, level)


def _flips(base: Outcomes, other: Outcomes) -> Flips:
    before, after = np.array(base.numerators), np.array(other.numerators)
    worse, better = int((after < before).sum()), int((after > before).sum())
    lost, gained = (worse, better) if base.higher_is_better else (better, worse)
    changed = None
    if base.answers is not None and other.answers is not None:
        changed = int((np.array(base.answers) != np.array(other.answers))[before == after].sum())
    return Flips(lost, gained, changed)


def _is_constant(influence: np.ndarray, parts: np.ndarray) -> bool:
    """Whether all units say the same, up to rounding of what their influence is made of."""
    return bool(np.abs(influence).max() <= 1e-12 * np.abs(parts).max())


def _are_shares(units: np.ndarray) -> bool:
    """Whether no numerator [:, ::2] is negative or exceeds its denominator [:, 1::2]."""
    return bool((units[:, ::2] >= 0).all() and (units[:, ::2] <= units[:, 1::2]).all())


def _effective_size(weights: np.ndarray) -> float:
    """How many units of equal weight are worth as much (Kish, Survey Sampling, 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError("the level of an interval must lie between 0 and 1", value=level, remedy="0.95 is usual")


def _check_pair(base: Outcomes, other: Outcomes) -> None:
    """Two outcomes pair if they say the same about the same samples."""
    for name in ("metric", "higher_is_better", "transform", "n", "samples", "groups"):
        first, second = getattr(base, name), getattr(other, name)
        if first != second:
            shown = f"{first} and {second}" if name != "groups" else "other clusters"
            raise DataError(
                f"paired outcomes must agree in {name}", value=shown, remedy="score both runs on the same samples"
            )
