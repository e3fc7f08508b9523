from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from masq.evaluation import inference
from masq.evaluation.inference import bca, bonett_price, mcnemar, resampled_sums, sign_flip, wilson


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(level: float) -> None:
    for n in (1, 2, 17, 400):
        for k in range(n + 1):
            expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
            assert wilson(k / n, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_ends_where_nothing_and_everything_is_right() -> None:
    low, high = wilson(1.0, 120, 0.95)
    assert high == 1.0
    assert low == pytest.approx(120 / (120 + 1.959964**2))
    assert wilson(0.0, 120, 0.95) == pytest.approx((0.0, 1 - low))


def test_bonett_price_by_hand() -> None:
    # Ten pairs, 3 gained, 1 lost: (4 - 2) / 12 -+ 1.96 sqrt((4/12 + 2/12 - (2/12)^2) / 12).
    half = 1.959964 * math.sqrt((0.5 - 1 / 36) / 12)
    assert bonett_price(3, 1, 10, 0.95) == pytest.approx((1 / 6 - half, 1 / 6 + half), rel=1e-6)
    low, high = bonett_price(0, 0, 120, 0.95)
    assert low == -high and 0.01 < high < 0.03
    assert bonett_price(1, 0, 1, 0.95)[1] == 1.0
    assert bonett_price(0, 1, 1, 0.95)[0] == -1.0


def test_mcnemar_is_a_binomial_test_of_the_flipped() -> None:
    for lost, gained in itertools.product(range(12), repeat=2):
        expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert mcnemar(lost, gained) == pytest.approx(expected)
    # By hand: 5 flipped, all in one direction: 2 / 2^5.
    assert mcnemar(0, 5) == mcnemar(5, 0) == 1 / 16
    assert mcnemar(2200, 2000) == pytest.approx(stats.binomtest(2000, 4200).pvalue)
    assert mcnemar(20_000, 0) == 0.0


def test_mcnemar_never_rejects_too_often() -> None:
    """Exactly: of ``total`` flips under the null hypothesis, lost ones are binomial."""
    for total in range(60):
        shares = stats.binom.pmf(np.arange(total + 1), total, 0.5)
        p = np.array([mcnemar(lost, total - lost) for lost in range(total + 1)])
        for level in (0.01, 0.05, 0.1, 0.5):
            assert shares[p <= level].sum() <= level + 1e-12


COLUMNS = np.array([[0.0, 1.0], [1.0, 3.0], [5.0, 4.0]])


def test_resamples_are_those_of_an_enumeration() -> None:
    drawn = Counter(map(tuple, resampled_sums(COLUMNS, 27_000).tolist()))
    every = Counter(tuple(COLUMNS[list(rows)].sum(0)) for rows in itertools.product(range(3), repeat=3))
    assert set(drawn) == set(every)
    for sums, ways in every.items():
        # Five standard errors of a count.
        assert abs(drawn[sums] - 1000 * ways) < 5 * math.sqrt(1000 * ways)


def test_chunks_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(resampled_sums(COLUMNS, 50), resampled_sums(COLUMNS, 50))
    monkeypatch.setattr(inference, "_DRAWS_PER_CHUNK", 10)
    sums = resampled_sums(COLUMNS, 50)
    assert sums.shape == (50, 2)
    assert len({tuple(row) for row in sums.tolist()}) > 5, "chunks repeat each other"
    # Units larger than a chunk.
    assert resampled_sums(np.ones((30, 1)), 4).tolist() == [[30.0]] * 4
    pairs = np.column_stack([np.arange(20.0), np.ones(20), np.arange(20.0) + (-1.0) ** np.arange(20), np.ones(20)])
    assert sign_flip(pairs, 99) == 1.0


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_bca_of_a_mean_is_scipys(level: float) -> None:
    """For a mean the influence is the jackknife's, and so nothing may differ but rounding."""
    data = np.random.default_rng(2).exponential(size=25)
    found = stats.bootstrap((data,), np.mean, confidence_level=level, n_resamples=999, method="BCa", rng=1)
    expected = (found.confidence_interval.low, found.confidence_interval.high)
    assert bca(found.bootstrap_distribution, data.mean(), data - data.mean(), level) == pytest.approx(expected)


def test_bca_of_a_ratio_is_nearly_scipys() -> None:
    generator = np.random.default_rng(3)
    words = generator.integers(1, 12, 200).astype(float)
    errors = generator.binomial(words.astype(int), generator.beta(0.5, 5, 200)).astype(float)

    def rate(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        return first.sum(axis) / second.sum(axis)

    found = stats.bootstrap((errors, words), rate, paired=True, n_resamples=4000, method="BCa", rng=1)
    mean = errors.sum() / words.sum()
    low, high = bca(found.bootstrap_distribution, mean, errors - mean * words, 0.95)
    width = found.confidence_interval.high - found.confidence_interval.low
    assert low == pytest.approx(found.confidence_interval.low, abs=0.01 * width)
    assert high == pytest.approx(found.confidence_interval.high, abs=0.01 * width)


def test_bca_stays_within_the_replicates_at_any_level() -> None:
    replicates, influence = np.arange(100.0), np.array([-1.0] * 99 + [99.0])
    for observed in (-5.0, 0.0, 50.0, 99.0, 200.0):
        low, high = bca(replicates, observed, influence, 0.9999)
        assert 0 <= low <= high <= 99


def brute_force(pairs: np.ndarray) -> float:
    """Share of exchanges at least as extreme, pair by pair, in exact fractions of whole numbers."""
    distances = []
    for exchanged in itertools.product((False, True), repeat=len(pairs)):
        rows = [row[[2, 3, 0, 1]] if swap else row for row, swap in zip(pairs, exchanged, strict=True)]
        a, b, c, d = np.sum(rows, axis=0)
        distances.append(abs(c / d - a / b))
    return float(np.mean([distance >= distances[0] - 1e-12 for distance in distances]))


@pytest.mark.parametrize("seed", range(8))
def test_sign_flip_is_an_exhaustive_permutation(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Small whole numbers make ties, both of units and of statistics.
    pairs = generator.integers(0, 4, (8, 4)).astype(float)
    pairs[:, [1, 3]] += 1
    assert sign_flip(pairs, 9) == pytest.approx(brute_force(pairs))


def test_sign_flip_is_scipys_permutation_of_samples() -> None:
    generator = np.random.default_rng(5)
    first, second = generator.normal(size=(2, 10))
    pairs = np.column_stack([first, np.ones(10), second, np.ones(10)])
    found = stats.permutation_test(
        (first, second), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(pairs, 9) == pytest.approx(found.pvalue)


def test_units_that_do_not_differ_do_not_matter() -> None:
    generator = np.random.default_rng(6)
    pairs = generator.normal(size=(300, 4)) ** 2 + 1
    pairs[:, 2:] = pairs[:, :2]
    pairs[:6, 2] += 1
    # Six units that differ, all in one direction: two of their 64 arrangements are as extreme.
    assert sign_flip(pairs, 9) == 2 / 64
    pairs[:, 2:] = pairs[:, :2]
    assert sign_flip(pairs, 9) == 1.0


def test_random_permutations_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(7)
    change = generator.normal(0.5, 1, 12)
    pairs = np.column_stack([np.zeros(12), np.ones(12), change, np.ones(12)])
    exact = sign_flip(pairs, 9)
    monkeypatch.setattr(inference, "MAX_ENUMERATED", 0)
    assert 0.02 < exact < 0.5
    assert sign_flip(pairs, 19_999) == pytest.approx(exact, abs=4 * math.sqrt(exact / 20_000))
    assert sign_flip(pairs, 19_999) == sign_flip(pairs, 19_999)


def test_a_random_p_is_never_zero() -> None:
    pairs = np.column_stack([np.zeros(40), np.ones(40), np.arange(40) + 1.0, np.ones(40)])
    assert sign_flip(pairs, 99) == 1 / 100
