from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from masq.errors import ConfigError, DataError
from masq.evaluation.inference import bonett_price, wilson
from masq.evaluation.outcomes import Outcomes, digests, hash_samples
from masq.evaluation.statistics import adjust, interval, paired, standard_error, value

Array = np.ndarray


@cache
def numbered(n: int) -> str:
    return hash_samples(map(str, range(n)))


def outcomes(
    numerators: Sequence[float] | Array,
    denominators: Sequence[float] | Array | None = None,
    *,
    transform: Literal["identity", "exp"] = "identity",
    better: bool = False,
    **fields: Any,
) -> Outcomes:
    metric = "perplexity" if transform == "exp" else "wer"
    counts = None if denominators is None else tuple(denominators)
    return Outcomes(metric, better, numbered(len(numerators)), tuple(numerators), counts, transform, **fields)


def hits(right: Sequence[float] | Array | str, **fields: Any) -> Outcomes:
    numbers = [int(hit) for hit in right]
    return Outcomes("exact_match", True, numbered(len(numbers)), tuple(numbers), **fields)


def test_value_and_error_of_accuracy_by_hand() -> None:
    found = hits("11100")
    assert value(found) == 0.6
    assert standard_error(found) == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert standard_error(found) == pytest.approx(np.std([1, 1, 1, 0, 0], ddof=1) / math.sqrt(5))


def test_value_of_perplexity_weighs_tokens_not_passages() -> None:
    found = outcomes([2.0, 30.0], [2, 10], transform="exp")
    assert value(found) == math.exp(32 / 12)


def test_error_of_perplexity_is_that_of_its_mean_times_its_slope() -> None:
    nll = np.random.default_rng(1).normal(3, 0.2, 50)
    found = outcomes(nll * 10, [10] * 50, transform="exp")
    assert value(found) == pytest.approx(math.exp(nll.mean()))
    assert standard_error(found) == pytest.approx(math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(50))


def test_value_and_error_of_word_errors() -> None:
    generator = np.random.default_rng(2)
    words = generator.integers(1, 12, 300)
    errors = generator.binomial(words, 0.2)
    found = outcomes(errors, words)
    assert value(found) == errors.sum() / words.sum()
    drawn = generator.integers(300, size=(4000, 300))
    assert standard_error(found) == pytest.approx((errors[drawn].sum(1) / words[drawn].sum(1)).std(), rel=0.05)


def test_doubling_every_sample_within_its_cluster_adds_no_knowledge() -> None:
    right = np.random.default_rng(3).integers(2, size=40)
    doubled = hits(np.repeat(right, 2), groups=np.repeat(np.arange(40), 2))
    assert standard_error(doubled) == pytest.approx(standard_error(hits(right)))
    assert standard_error(hits(np.repeat(right, 2))) == pytest.approx(standard_error(doubled) / math.sqrt(2), rel=0.02)
    assert value(doubled) == value(hits(right))
    ends, single = interval(doubled), interval(hits(right))
    assert ends == pytest.approx(single, abs=0.03)


def test_order_and_numbers_of_clusters_do_not_matter() -> None:
    words, errors = np.arange(1, 9), np.array([0, 1, 0, 2, 3, 0, 1, 4])
    groups = np.array([5, 3, 5, 9, 3, 7, 7, 7])
    order = np.array([4, 1, 7, 0, 2, 3, 6, 5])
    one = outcomes(errors, words, groups=groups)
    other = outcomes(errors[order], words[order], groups=1000 - groups[order])
    assert standard_error(one) == pytest.approx(standard_error(other))
    sums = [(errors[groups == g].sum(), words[groups == g].sum()) for g in np.unique(groups)]
    by_cluster = outcomes(*zip(*sums, strict=True))
    assert standard_error(one) == pytest.approx(standard_error(by_cluster))
    assert interval(one) == interval(by_cluster)


def test_passages_without_tokens_change_nothing() -> None:
    full = outcomes([30.0, 50.0, 41.0], [10, 15, 13], transform="exp")
    padded = outcomes([30.0, 0.0, 50.0, 41.0, 0.0], [10, 0, 15, 13, 0], transform="exp")
    assert (value(padded), standard_error(padded), interval(padded)) == (
        value(full),
        standard_error(full),
        interval(full),
    )
    assert paired(padded, padded).p_value == 1.0


def test_hopeless_perplexity_is_infinite_not_an_exception() -> None:
    hopeless = outcomes([8000.0, 9000.0, 9500.0], [10, 10, 10], transform="exp")
    fine = outcomes([30.0, 31.0, 36.0], [10, 10, 10], transform="exp")
    assert value(hopeless) == standard_error(hopeless) == math.inf
    assert interval(hopeless) == (math.inf, math.inf)
    worse = paired(fine, hopeless)
    assert (worse.difference, worse.interval, worse.p_value) == (math.inf, None, 0.25)
    assert math.isnan(paired(hopeless, hopeless).difference)


def test_interval_of_right_and_wrong_is_wilsons() -> None:
    assert interval(hits("1" * 9 + "0")) == wilson(0.9, 10, 0.95)
    assert interval(hits("1" * 9 + "0"), 0.8) == wilson(0.9, 10, 0.8)


def test_interval_of_a_ratio_is_a_bootstrap_of_all_resamples() -> None:
    """Three samples have 27 resamples: BCa over them by hand."""
    errors, words = np.array([0.0, 1.0, 5.0]), np.array([4.0, 5.0, 6.0])
    every = [list(rows) for rows in itertools.product(range(3), repeat=3)]
    rates = np.array([errors[rows].sum() / words[rows].sum() for rows in every])
    rate = 6 / 15
    influence = errors - rate * words
    bias = stats.norm.ppf((rates < rate).mean() + (rates == rate).mean() / 2)
    skew = (influence**3).sum() / 6 / (influence**2).sum() ** 1.5
    shifted = bias + stats.norm.ppf([0.1, 0.9])
    expected = np.quantile(np.repeat(rates, 400), stats.norm.cdf(bias + shifted / (1 - skew * shifted)))
    found = interval(outcomes(errors, words), 0.8, num_resamples=27 * 400)
    assert found == pytest.approx(tuple(expected), abs=1e-9)
    assert found is not None and 0 < found[0] < rate < found[1] < 5 / 6


def test_interval_of_perplexity_is_that_of_its_logarithm() -> None:
    nll, tokens = np.random.default_rng(4).normal(40, 9, 30), np.full(30, 12)
    mean = interval(outcomes(nll, tokens))
    assert mean is not None
    assert interval(outcomes(nll, tokens, transform="exp")) == pytest.approx(tuple(math.exp(end) for end in mean))


def test_intervals_are_reproducible_and_nested() -> None:
    found = outcomes([0, 3, 1, 0, 7, 2, 0, 1], [3, 5, 4, 4, 9, 6, 2, 8])
    narrow, wide = interval(found, 0.8), interval(found, 0.99)
    assert narrow == interval(found, 0.8)
    assert narrow is not None and wide is not None
    assert wide[0] < narrow[0] < value(found) < narrow[1] < wide[1]


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, math.nan])
def test_levels_are_shares(level: float) -> None:
    for call in (lambda: interval(hits("10"), level), lambda: paired(hits("10"), hits("10"), level)):
        with pytest.raises(ConfigError, match=r"level of an interval must lie between 0 and 1 .*0\.95 is usual"):
            call()


def test_intervals_where_nothing_varies() -> None:
    assert interval(hits("1" * 120)) == pytest.approx((0.969, 1.0), abs=1e-3)
    assert interval(hits("1")) == pytest.approx((0.2065, 1.0), abs=1e-3)
    # Thirty pictures, four questions about each: what is known is what thirty samples tell.
    clustered = hits("1" * 120, groups=np.repeat(np.arange(30), 4))
    assert interval(clustered) == pytest.approx(wilson(1.0, 30, 0.95))
    assert interval(hits("0" * 6, groups=(0, 0, 0, 0, 1, 1))) == pytest.approx(wilson(0.0, 36 / 20, 0.95))
    # No error in utterances of unequal length.
    assert interval(outcomes([0] * 4, [1, 2, 3, 4])) == pytest.approx(wilson(0.0, 100 / 30, 0.95))


@pytest.mark.parametrize(
    "found",
    [
        outcomes([12.0], [4], transform="exp"),
        outcomes([0.3, 0.6], [0.1, 0.2], transform="exp"),
        outcomes([1], [3]),
        outcomes([1, 2, 4], [3, 6, 12]),
        outcomes([4, 8], [2, 4]),
    ],
)
def test_samples_that_do_not_tell_how_a_value_varies_have_no_interval(found: Outcomes) -> None:
    assert interval(found) is None
    assert paired(found, found).interval is None or found.transform == "identity"


def test_one_sample_has_no_standard_error() -> None:
    assert standard_error(hits("1")) is None
    assert standard_error(outcomes([3.0], [2], transform="exp")) is None
    assert standard_error(hits("10", groups=(4, 4))) is None


BASE, OTHER = hits("1111100000"), hits("1100011000")


def test_paired_accuracy_by_hand() -> None:
    found = paired(BASE, OTHER)
    assert found.n == 10
    assert found.difference == pytest.approx(-0.1)
    assert found.flips is not None
    assert (found.flips.lost, found.flips.gained, found.flips.changed) == (3, 2, None)
    # Of five flips three or more in one direction: always, and so p = 1; six of six: 2 / 64.
    assert (found.test, found.p_value) == ("mcnemar", 1.0)
    assert paired(hits("1" * 6 + "0" * 4), hits("0" * 10)).p_value == 2 / 64
    assert found.interval == bonett_price(2, 3, 10, 0.95)
    back = paired(OTHER, BASE)
    assert (back.difference, back.p_value) == (-found.difference, found.p_value)
    assert back.interval == pytest.approx(tuple(-end for end in reversed(found.interval or ())))


def test_changed_answers_are_those_that_changed_no_score() -> None:
    before = hits("1100", answers=digests(["yes", "no", "3", "4"]))
    after = hits("1010", answers=digests(["yes", "yes", "5", "7"]))
    flips = paired(before, after).flips
    assert flips is not None
    assert (flips.lost, flips.gained, flips.changed) == (1, 1, 1)
    without = paired(before, hits("1010")).flips
    assert without is not None and without.changed is None


def test_lost_and_gained_follow_the_direction_of_the_metric() -> None:
    """A rate of failures: 1 is wrong."""
    before, after = outcomes([0, 0, 0, 1]), outcomes([1, 1, 0, 0])
    found = paired(before, after)
    assert found.flips is not None
    assert (found.flips.lost, found.flips.gained) == (2, 1)
    assert found.difference == 0.25
    assert found.interval == bonett_price(2, 1, 4, 0.95)


@pytest.mark.parametrize(
    ("same", "ends"),
    [
        (hits("1101"), bonett_price(0, 0, 4, 0.95)),
        (hits("1"), bonett_price(0, 0, 1, 0.95)),
        (hits("1101", groups=(0, 0, 1, 1)), bonett_price(0, 0, 2, 0.95)),
        (outcomes([0, 1, 2], [4, 4, 4]), bonett_price(0, 0, 3, 0.95)),
        (outcomes([0, 9, 2], [4, 4, 4]), None),
        (outcomes([30.0, 40.0], [10, 9], transform="exp"), None),
        (outcomes([30.0], [10], transform="exp"), None),
    ],
)
def test_identical_outcomes_differ_in_nothing(same: Outcomes, ends: tuple[float, float] | None) -> None:
    found = paired(same, same)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.interval == (None if ends is None else pytest.approx(ends))
    assert found.flips is None or (found.flips.lost, found.flips.gained) == (0, 0)


def test_one_sample_proves_nothing() -> None:
    found = paired(hits("1"), hits("0"))
    assert (found.difference, found.p_value, found.test) == (-1.0, 1.0, "mcnemar")
    found = paired(outcomes([30.0], [10], transform="exp"), outcomes([45.0], [10], transform="exp"))
    assert (found.p_value, found.interval, found.test) == (1.0, None, "sign_flip")
    assert found.difference == pytest.approx(math.exp(4.5) - math.exp(3))


def test_clusters_that_all_turn_keep_a_width() -> None:
    groups = (0, 0, 1, 1, 2, 2)
    found = paired(hits("000000", groups=groups), hits("111111", groups=groups))
    assert (found.difference, found.p_value, found.test) == (1.0, 2 / 8, "sign_flip")
    assert found.interval == pytest.approx(bonett_price(3, 0, 3, 0.95))
    assert found.flips is not None and found.flips.gained == 6


def test_paired_interval_is_narrower_than_the_scores_own() -> None:
    generator = np.random.default_rng(5)
    tokens = generator.integers(20, 200, 100)
    nll = tokens * generator.normal(3, 0.5, 100)
    base = outcomes(nll, tokens, transform="exp")
    other = outcomes(nll + 0.05 * tokens + generator.normal(0, 0.3, 100), tokens, transform="exp")
    found, alone = paired(base, other), interval(base)
    assert found.interval is not None and alone is not None
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    assert found.interval[1] - found.interval[0] < (alone[1] - alone[0]) / 10
    assert found.p_value == 1 / 20_000
    assert (found.test, found.flips, found.n) == ("sign_flip", None, 100)
    assert found == paired(base, other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Outcomes("acc", True, BASE.samples, BASE.numerators), r"agree in metric \(got: exact_match and acc\)"),
        (hits("1" * 9), "agree in n .got: 10 and 9.. Score both runs on the same samples"),
        (Outcomes("exact_match", True, hash_samples("abcdefghij"), BASE.numerators), "agree in samples"),
        (Outcomes("exact_match", False, BASE.samples, BASE.numerators), "agree in higher_is_better"),
        (Outcomes("exact_match", True, BASE.samples, BASE.numerators, transform="exp"), "agree in transform"),
        (hits("1111100000", groups=range(10)), "agree in groups .got: other clusters"),
    ],
)
def test_only_outcomes_of_the_same_samples_pair(other: Outcomes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired(BASE, other)


def test_holm_by_hand() -> None:
    assert adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust([0.2, 0.3, 0.9]) == pytest.approx([0.6, 0.6, 0.9])
    assert adjust([0.5, 0.5, 0.5]) == [1.0, 1.0, 1.0]
    assert adjust([0.02, 0.02]) == [0.04, 0.04]
    assert adjust([0.03]) == [0.03]
    assert adjust([]) == []


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_what_is_no_p_value_is_refused(wrong: float) -> None:
    with pytest.raises(DataError, match="p-values must lie between 0 and 1"):
        adjust([0.5, wrong])


def test_holm_bounds_the_chance_of_any_false_claim() -> None:
    p = np.random.default_rng(6).uniform(size=(4000, 20))
    assert np.mean([min(adjust(row)) < 0.05 for row in p.tolist()]) == pytest.approx(0.05, abs=0.012)
    assert np.mean(p.min(1) < 0.05) > 0.6


# Simulations. Each population yields a sample of known truth; the seeds are fixed, and with 700 samples a coverage of
# 0.95 has a standard error of 0.008.
Draw = Callable[[np.random.Generator], tuple[Outcomes, float]]
DrawPair = Callable[[np.random.Generator], tuple[Outcomes, Outcomes, float]]
NUM_SIMULATED = 700
NUM_RESAMPLES = 600


def clustered_accuracy(share: float) -> Draw:
    """80 pictures with one to four questions; questions about one picture correlate by a half."""

    def draw(generator: np.random.Generator) -> tuple[Outcomes, float]:
        sizes = generator.integers(1, 5, 80)
        shares = generator.beta(share, 1 - share, 80)
        groups = np.repeat(np.arange(80), sizes)
        return hits(generator.binomial(1, shares[groups]), groups=groups), share

    return draw


def word_errors(generator: np.random.Generator) -> tuple[Outcomes, float]:
    """150 utterances of 1 to 11 words, most of them without errors and some with many: a rate of 0.1."""
    words = generator.integers(1, 12, 150)
    return outcomes(generator.binomial(words, generator.beta(0.5, 4.5, 150)), words), 0.1


def clustered_word_errors(generator: np.random.Generator) -> tuple[Outcomes, float]:
    """80 speakers with three utterances each."""
    words, groups = generator.integers(1, 12, 240), np.repeat(np.arange(80), 3)
    return outcomes(generator.binomial(words, generator.beta(1, 4, 80)[groups]), words, groups=groups), 0.2


def perplexity(generator: np.random.Generator) -> tuple[Outcomes, float]:
    """120 passages of 20 to 200 tokens."""
    tokens = generator.integers(20, 201, 120)
    nll = tokens * generator.normal(3, 0.5, 120) + np.sqrt(tokens) * generator.normal(0, 1, 120)
    return outcomes(nll, tokens, transform="exp"), math.exp(3)


@pytest.mark.parametrize(
    "draw",
    [clustered_accuracy(0.5), clustered_accuracy(0.9), word_errors, clustered_word_errors, perplexity],
    ids=["accuracy 0.5 in clusters", "accuracy 0.9 in clusters", "wer", "wer in clusters", "perplexity"],
)
def test_intervals_cover_the_truth_as_often_as_they_say(draw: Draw) -> None:
    generator, covered = np.random.default_rng(7), 0
    for _ in range(NUM_SIMULATED):
        found, truth = draw(generator)
        ends = interval(found, num_resamples=NUM_RESAMPLES)
        assert ends is not None
        covered += ends[0] <= truth <= ends[1]
    assert 0.93 <= covered / NUM_SIMULATED <= 0.97


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("n", [120, 400])
def test_intervals_of_accuracy_cover_exactly_known_shares(n: int, share: float) -> None:
    """No simulation: the number of right answers is binomial."""
    ends = [interval(hits("1" * right + "0" * (n - right))) for right in range(n + 1)]
    covers = np.array([low <= share <= high for low, high in ends if low is not None])
    assert 0.93 <= stats.binom.pmf(np.arange(n + 1), n, share) @ covers <= 0.97


def test_ignoring_clusters_would_be_wrong() -> None:
    """The simulation can fail: the same samples without their clusters."""
    generator, covered, draw = np.random.default_rng(7), 0, clustered_accuracy(0.9)
    for _ in range(NUM_SIMULATED):
        found, truth = draw(generator)
        low, high = interval(hits(found.numerators)) or (0, 0)
        covered += low <= truth <= high
    assert covered / NUM_SIMULATED < 0.91


def paired_accuracy(lost: float, gained: float, num_clusters: int | None = None) -> DrawPair:
    """120 samples, or three times ``num_clusters`` whose flips occur by cluster."""

    def draw(generator: np.random.Generator) -> tuple[Outcomes, Outcomes, float]:
        change = generator.choice([-1, 1, 0], p=[lost, gained, 1 - lost - gained], size=num_clusters or 120)
        groups = None if num_clusters is None else np.repeat(np.arange(num_clusters), 3)
        change = change if groups is None else change[groups]
        before = np.where(change == 0, generator.integers(2, size=len(change)), change < 0)
        return hits(before, groups=groups), hits(before + change, groups=groups), gained - lost

    return draw


def paired_word_errors(generator: np.random.Generator) -> tuple[Outcomes, Outcomes, float]:
    """150 utterances; hard ones are hard for both runs, and the second makes twice the errors on average."""
    words, hard = generator.integers(1, 12, 150), generator.beta(1, 4, 150)
    first, second = generator.binomial(words, hard / 2), generator.binomial(words, hard)
    return outcomes(first, words), outcomes(second, words), 0.1


def paired_perplexity(generator: np.random.Generator) -> tuple[Outcomes, Outcomes, float]:
    tokens = generator.integers(20, 201, 120)
    nll = tokens * generator.normal(3, 0.5, 120)
    other = nll + tokens * generator.normal(0.1, 0.1, 120)
    pair = [outcomes(values, tokens, transform="exp") for values in (nll, other)]
    return pair[0], pair[1], math.exp(3.1) - math.exp(3)


@pytest.mark.parametrize(
    "draw",
    [
        paired_accuracy(0.05, 0.05),
        paired_accuracy(0.2, 0.05),
        paired_accuracy(0.15, 0.05, 80),
        paired_word_errors,
        paired_perplexity,
    ],
    ids=["few flips", "loss", "loss in clusters", "wer", "perplexity"],
)
def test_paired_intervals_cover_the_truth_as_often_as_they_say(draw: DrawPair) -> None:
    generator, covered = np.random.default_rng(8), 0
    for _ in range(NUM_SIMULATED):
        base, other, truth = draw(generator)
        ends = paired(base, other, num_resamples=NUM_RESAMPLES, num_permutations=1).interval
        assert ends is not None
        covered += ends[0] <= truth <= ends[1]
    assert 0.93 <= covered / NUM_SIMULATED <= 0.97


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.01, 0.01), (0.03, 0.0), (0.1, 0.02)])
def test_paired_intervals_of_few_flips_are_rather_too_wide(lost: float, gained: float) -> None:
    """Exactly, over all numbers of flips: where a bootstrap covers 71 to 88 %, at least 94 % and up to all."""
    for n in (40, 120):
        covered = 0.0
        for down, up in itertools.product(range(40), repeat=2):
            if down + up <= n:
                share = stats.multinomial.pmf([down, up, n - down - up], n, [lost, gained, 1 - lost - gained])
                low, high = bonett_price(up, down, n, 0.95)
                covered += share * (low <= gained - lost <= high)
        assert covered >= 0.94


def null_p_values(draw: DrawPair, count: int = 400) -> Array:
    """p-values where either run is equally likely to be called the base, unit by unit."""
    generator = np.random.default_rng(9)
    found = []
    for _ in range(count):
        base, other, _ = draw(generator)
        groups = np.arange(base.n) if base.groups is None else np.array(base.groups)
        swap = generator.integers(2, size=groups.max() + 1)[groups].astype(bool)
        first, second = np.array(base.numerators), np.array(other.numerators)
        fields = {"transform": base.transform, "groups": base.groups}
        mixed = [outcomes(np.where(swap, a, b), base.counts, **fields) for a, b in ((first, second), (second, first))]
        found.append(paired(*mixed, num_resamples=2, num_permutations=399).p_value)
    return np.array(found)


def test_p_values_are_uniform_under_the_null_hypothesis() -> None:
    p = null_p_values(paired_perplexity)
    assert stats.kstest(p, "uniform").pvalue > 0.05
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_p_values_of_whole_errors_are_never_too_small() -> None:
    """Whole numbers tie, and ties count as extreme: small p-values may be rarer than under a uniform distribution."""
    p = null_p_values(paired_word_errors)
    assert stats.kstest(p, "uniform", alternative="greater").pvalue > 0.05
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_p_values_of_clusters_are_honest_where_mcnemar_is_not() -> None:
    draw = paired_accuracy(0.2, 0.2, 30)
    assert np.mean(null_p_values(draw) <= 0.05) <= 0.07

    def without_clusters(generator: np.random.Generator) -> bool:
        base, other, _ = draw(generator)
        return paired(hits(base.numerators), hits(other.numerators)).p_value <= 0.05

    generator = np.random.default_rng(9)
    assert np.mean([without_clusters(generator) for _ in range(400)]) > 0.15


def test_differences_are_found() -> None:
    generator = np.random.default_rng(10)
    for draw in (paired_accuracy(0.2, 0.02), paired_word_errors, paired_perplexity):
        p = [paired(*draw(generator)[:2], num_resamples=2, num_permutations=999).p_value for _ in range(20)]
        assert np.median(p) < 0.01


def test_a_bootstrap_takes_milliseconds() -> None:
    generator = np.random.default_rng(11)
    words = generator.integers(1, 12, 400)
    found = outcomes(generator.binomial(words, 0.2), words)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        interval(found, num_resamples=2000)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1
