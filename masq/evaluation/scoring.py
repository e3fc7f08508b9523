"""From answers and likelihoods to scores with standard errors. Pure functions of plain numbers and strings."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np

from masq.errors import DataError, NumericalError
from masq.registry import Registry

NUM_RESAMPLES = 1000
_BOOTSTRAP_SEED = 0
# exp() of more is no float64 any longer.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: the metric.
        n: samples behind it.
        standard_error: of the value over samples, None where one sample is all there is.
        metric: its name.
        higher_is_better: direction.
        valid: False if too many answers failed for the value to mean what its name says.
    """

    value: float
    n: int
    standard_error: float | None
    metric: str
    higher_is_better: bool
    valid: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as they enter the record."""
        return dataclasses.asdict(self)


def normalise(text: str) -> str:
    """``text`` casefolded and stripped, white space inside it made single spaces, punctuation at its end removed.

    Models like to end an answer with a full stop; inside a text or in front of it punctuation means something.
    """
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Share of answers that equal their reference after ``normalise``; standard error sqrt(p (1 - p) / (n - 1)).

    Args:
        answers: what the model said.
        references: what was expected, in the same order; at least one.
    """
    hits = [normalise(answer) == normalise(reference) for answer, reference in zip(answers, references, strict=True)]
    return _share(hits, "exact_match")


def _share(hits: Sequence[bool], metric: str) -> Score:
    """Share of hits; standard error sqrt(p (1 - p) / (n - 1))."""
    share, n = sum(hits) / len(hits), len(hits)
    error = math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
    return Score(share, n, error, metric, higher_is_better=True)


def word_error_rate(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus word error rate: substitutions, deletions and insertions of all utterances over all reference words.

    Texts are normalised word by word (``normalise``). The standard error is a seeded bootstrap over utterances.

    Args:
        answers: what the model said.
        references: what was expected, in the same order; at least one.

    Raises:
        DataError: a reference without words, for which no rate is defined.
    """
    wanted, said = ([_words(text) for text in texts] for texts in (references, answers))
    if "" in wanted:
        empty = references[wanted.index("")]
        raise DataError("a word error rate needs references with words", value=repr(empty), remedy="correct the data")
    errors = np.array([_num_errors(chunks) for chunks in jiwer.process_words(wanted, said).alignments], dtype=float)
    words = np.array([len(text.split()) for text in wanted], dtype=float)
    value = float(errors.sum() / words.sum())
    return Score(value, len(wanted), _bootstrap_error(errors, words), "wer", higher_is_better=False)


def _words(text: str) -> str:
    return " ".join(word for word in map(normalise, text.split()) if word)


def _num_errors(chunks: Sequence[Any]) -> int:
    """Edits of one utterance: an inserted stretch has no reference words, any other wrong one counts those it has."""
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in chunks
        if chunk.type != "equal"
    )


def _bootstrap_error(numerators: np.ndarray, denominators: np.ndarray) -> float | None:
    """Standard deviation of the ratio of sums over samples drawn with replacement; None for a single sample."""
    n = len(numerators)
    if n < 2:
        return None
    drawn = np.random.default_rng(_BOOTSTRAP_SEED).integers(n, size=(NUM_RESAMPLES, n))
    return float((numerators[drawn].sum(1) / denominators[drawn].sum(1)).std(ddof=1))


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


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> Score:
    """Token perplexity exp(sum of nll / sum of tokens); standard error over passages by the delta method.

    Args:
        nll: negative log-likelihood of each passage in nats.
        num_tokens: predicted tokens of each passage.

    Raises:
        DataError: no token is predicted at all.
    """
    if not sum(num_tokens):
        raise DataError("perplexity needs passages of more than one token", value=f"{len(nll)} passages without")
    mean, error = ratio(nll, num_tokens)
    value = math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
    scaled = None if error is None else (value * error if math.isfinite(value) else math.inf)
    return Score(value, len(nll), scaled, "perplexity", higher_is_better=False)


@dataclass(frozen=True)
class Judged:
    """What a model thinks of the choices of one sample.

    Attributes:
        log_likelihoods: of each choice after its context, in nats.
        num_bytes: length of each choice in UTF-8, without the space before it.
        right: index of the right one.
    """

    log_likelihoods: tuple[float, ...]
    num_bytes: tuple[int, ...]
    right: int

    @property
    def per_byte(self) -> tuple[float, ...]:
        """Log-likelihood of each choice divided by its length in bytes."""
        return tuple(value / size for value, size in zip(self.log_likelihoods, self.num_bytes, strict=True))


def preferred(values: Sequence[float]) -> int | None:
    """Index of the largest value, None if several share it.

    Raises:
        NumericalError: a value is NaN or infinite, and so nothing is preferred.
    """
    if not all(math.isfinite(value) for value in values):
        raise NumericalError("log-likelihoods must be finite", value=list(values), remedy="use a wider scheme")
    best = max(values)
    return None if list(values).count(best) > 1 else list(values).index(best)


def accuracy(judged: Sequence[Judged]) -> Score:
    """Share of samples whose right choice is more likely than every other; a tie counts as wrong.

    Args:
        judged: at least one sample.

    Raises:
        NumericalError: a log-likelihood is NaN or infinite.
    """
    return _share([preferred(one.log_likelihoods) == one.right for one in judged], "acc")


def normalised_accuracy(judged: Sequence[Judged]) -> Score:
    """``accuracy`` by log-likelihood per byte, so that a choice does not win by being short.

    lm-eval's ``acc_norm`` counts characters, which is the same in ASCII.

    Args:
        judged: at least one sample.

    Raises:
        NumericalError: a log-likelihood is NaN or infinite.
    """
    return _share([preferred(one.per_byte) == one.right for one in judged], "acc_norm")


def num_ties(judged: Sequence[Judged]) -> int:
    """How many samples have several best choices, in total or per byte."""
    return sum(None in (preferred(one.log_likelihoods), preferred(one.per_byte)) for one in judged)


ANSWER_METRICS: Registry[Callable[[Sequence[str], Sequence[str]], Score]] = Registry("metric of answers")
ANSWER_METRICS.register("exact_match", exact_match)
ANSWER_METRICS.register("wer", word_error_rate)

CHOICE_METRICS: Registry[Callable[[Sequence[Judged]], Score]] = Registry("metric of choices")
CHOICE_METRICS.register("acc", accuracy)
CHOICE_METRICS.register("acc_norm", normalised_accuracy)
