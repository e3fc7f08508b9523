from __future__ import annotations

import math
from collections.abc import Callable

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masq.errors import ConfigError, DataError, NumericalError
from masq.evaluation import scoring
from masq.evaluation.outcomes import Outcomes
from masq.evaluation.scoring import (
    ANSWER_METRICS,
    CHOICE_METRICS,
    Judged,
    Score,
    normalise,
    num_ties,
)
from masq.evaluation.statistics import ratio
from masq.evaluation.tasks import TASKS


def scored(metric: Callable[..., Outcomes]) -> Callable[..., Score]:
    """The score that a metric's outcomes make."""
    return lambda *arguments: Score.of(metric(*arguments))


exact_match, word_error_rate = scored(scoring.exact_match), scored(scoring.word_error_rate)
accuracy, normalised_accuracy = scored(scoring.accuracy), scored(scoring.normalised_accuracy)
perplexity = scored(scoring.perplexity)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" Seven\n", "seven"),
        ("YES.", "yes"),
        ("yes . !", "yes"),
        ("two  words", "two words"),
        ("-5", "-5"),
        ("3.5", "3.5"),
        ("STRASSE", "strasse"),
        ("straße", "strasse"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


def test_exact_match_by_hand() -> None:
    score = exact_match(["Yes.", "no", "27", "2 7"], ["yes", "yes", "27", "27"])
    assert (score.value, score.n, score.metric, score.higher_is_better, score.valid) == (
        0.5,
        4,
        "exact_match",
        True,
        True,
    )
    assert score.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    hits = np.array([1, 0, 1, 0])
    assert score.standard_error == pytest.approx(hits.std(ddof=1) / 2)


def test_single_sample_has_no_standard_error() -> None:
    assert exact_match(["a"], ["a"]).standard_error is None
    assert word_error_rate(["a"], ["a"]).standard_error is None
    assert perplexity([1.0], [1]).standard_error is None


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("answers", "references", "rate"),
    [
        (["the cat sat"], ["the cat sat"], 0.0),
        (["the cat"], ["the cat sat"], 1 / 3),
        (["the fat cat sat"], ["the cat sat"], 1 / 3),
        (["the bat sat"], ["the cat sat"], 1 / 3),
        ([""], ["the cat sat"], 1.0),
        (["a b c d e f"], ["x"], 6.0),
        (["The CAT, sat."], ["the cat sat"], 0.0),
        # Of the corpus, not the mean of the utterances (which would be 0.5).
        (["a", "b c d"], ["x", "b c d"], 1 / 4),
        (["one three", "two two nine"], ["one two three", "two nine"], 2 / 5),
    ],
)
def test_word_error_rate_by_hand(answers: list[str], references: list[str], rate: float) -> None:
    score = word_error_rate(answers, references)
    assert score.value == pytest.approx(rate)
    assert (score.n, score.metric, score.higher_is_better) == (len(references), "wer", False)


WORDS = st.lists(st.sampled_from(["one", "two", "six"]), min_size=1, max_size=5).map(" ".join)


@given(st.lists(st.tuples(WORDS | st.just(""), WORDS), min_size=1, max_size=6))
def test_word_error_rate_is_jiwers(pairs: list[tuple[str, str]]) -> None:
    answers, references = ([pair[side] for pair in pairs] for side in (0, 1))
    assert word_error_rate(answers, references).value == pytest.approx(jiwer.wer(references, answers))


def test_word_error_rate_of_equal_utterances_has_the_known_error() -> None:
    generator = np.random.default_rng(3)
    references = ["a b c d"] * 400
    wrong = generator.integers(0, 5, 400)
    answers = [" ".join(["x"] * k + ["a", "b", "c", "d"][k:]) for k in wrong]
    score = word_error_rate(answers, references)
    assert score == word_error_rate(answers, references)
    # With utterances of one length the rate is a plain mean, whose standard error is known.
    assert score.standard_error == pytest.approx((wrong / 4).std(ddof=1) / 20, rel=1e-9)


def test_reference_without_words() -> None:
    with pytest.raises(DataError, match="needs references with words.*' ... '"):
        word_error_rate(["a", "b"], ["a", " ... "])


def test_perplexity_weighs_tokens_not_passages() -> None:
    score = perplexity([2.0, 30.0], [2, 10])
    assert score.value == pytest.approx(math.exp(32 / 12))
    assert (score.n, score.metric, score.higher_is_better) == (2, "perplexity", False)


def test_perplexity_of_equal_passages_has_the_known_error() -> None:
    nll = np.random.default_rng(5).normal(3, 0.2, 50)
    score = perplexity(list(nll * 10), [10] * 50)
    assert score.value == pytest.approx(math.exp(nll.mean()))
    assert score.standard_error == pytest.approx(math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(50))


def test_hopeless_perplexity_is_infinite_not_an_exception() -> None:
    score = perplexity([8000.0, 9000.0], [10, 10])
    assert score.value == math.inf
    assert score.standard_error == math.inf


def test_perplexity_needs_predicted_tokens() -> None:
    with pytest.raises(DataError, match="more than one token"):
        perplexity([0.0], [0])


def test_ratio_error_agrees_with_a_bootstrap() -> None:
    generator = np.random.default_rng(8)
    counts = generator.integers(1, 20, 300)
    sums = counts * generator.normal(2, 0.5, 300)
    value, error = ratio(list(sums), list(counts))
    drawn = generator.integers(300, size=(3000, 300))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert value == pytest.approx(sums.sum() / counts.sum())
    assert error == pytest.approx(resampled.std(), rel=0.1)


def test_every_task_names_known_metrics() -> None:
    for name in TASKS.names():
        kind = TASKS.get(name)
        known = {
            "generate": ANSWER_METRICS.names(),
            "likelihood": ["perplexity"],
            "choose": CHOICE_METRICS.names(),
        }[kind.mode]
        assert kind.metrics
        assert set(kind.metrics) <= set(known)


def test_tasks_of_the_embedded_data() -> None:
    new = {"read", "digits", "sum", "table", "speech", "same", "larger", "ask", "manual", "tale", "choice"}
    assert set(TASKS.names()) == new | {"prose"}
    assert TASKS.get("speech").metrics == ("exact_match", "wer")
    assert TASKS.get("choice").metrics == ("acc_norm", "acc")
    assert TASKS.get("table").metrics == ("exact_match",)
    assert TASKS.get("manual") == TASKS.get("tale") == TASKS.get("prose")
    with pytest.raises(ConfigError, match="Did you mean digits"):
        TASKS.get("digit")


JUDGED = [
    Judged((-4.0, -6.0), (2, 12), 0),  # more likely, less likely per byte
    Judged((-4.0, -6.0), (2, 12), 1),
    Judged((-1.0, -2.0, -3.0), (1, 1, 1), 0),
    Judged((-1.0, -2.0, -3.0), (1, 1, 1), 2),
]


def test_choices_by_hand() -> None:
    plain, normalised = accuracy(JUDGED), normalised_accuracy(JUDGED)
    assert (plain.metric, plain.value, plain.n) == ("acc", 0.5, 4)
    assert (normalised.metric, normalised.value, normalised.n) == ("acc_norm", 0.5, 4)
    assert accuracy(JUDGED[:1]).value == 1 and normalised_accuracy(JUDGED[:1]).value == 0
    assert accuracy(JUDGED[1:2]).value == 0 and normalised_accuracy(JUDGED[1:2]).value == 1
    assert plain.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert accuracy(JUDGED[:1]).standard_error is None
    assert plain.higher_is_better and normalised.higher_is_better


def test_choices_agree_with_argmax() -> None:
    generator = np.random.default_rng(3)
    values, sizes = -generator.gamma(3, 2, (50, 4)), generator.integers(1, 30, (50, 4))
    judged = [Judged(tuple(v), tuple(s), 1) for v, s in zip(values.tolist(), sizes.tolist(), strict=True)]
    assert accuracy(judged).value == (values.argmax(1) == 1).mean()
    assert normalised_accuracy(judged).value == ((values / sizes).argmax(1) == 1).mean()
    assert num_ties(judged) == 0


def test_a_tie_for_the_best_is_wrong_wherever_the_right_one_stands() -> None:
    for right in range(3):
        tied = [Judged((-1.0, -1.0, -5.0), (3, 3, 3), right)]
        assert accuracy(tied).value == normalised_accuracy(tied).value == 0
        assert num_ties(tied) == 1
    assert accuracy([Judged((-1.0, -5.0, -5.0), (3, 3, 3), 0)]).value == 1
    per_byte_only = [Judged((-2.0, -4.0), (1, 2), 0)]
    assert accuracy(per_byte_only).value == 1 and normalised_accuracy(per_byte_only).value == 0
    assert num_ties(per_byte_only) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_preferred_among_undefined_values(bad: float) -> None:
    for values in ((bad, -1.0), (-1.0, bad)):
        for metric in (accuracy, normalised_accuracy, num_ties):
            with pytest.raises(NumericalError, match="must be finite"):
                metric([Judged(values, (1, 1), 0)])
