"""From answers and likelihoods to outcomes and scores with their errors: pure functions of numbers and strings."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer

from masq.errors import DataError, NumericalError
from masq.evaluation.outcomes import Outcomes, hash_samples
from masq.evaluation.statistics import interval, standard_error, value
from masq.registry import Registry

# Who was asked is filled in by whoever knows the samples.
_UNNAMED = hash_samples(())


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: the metric.
        n: samples behind it.
        standard_error: of the value over samples, None where one sample is all there is.
        interval: at 95 %, None where the samples do not tell how the value varies.
        metric: its name.
        higher_is_better: direction.
        valid: False if too many answers failed for the value to mean what its name says.
    """

    value: float
    n: int
    standard_error: float | None
    interval: tuple[float, float] | None
    metric: str
    higher_is_better: bool
    valid: bool = True

    @classmethod
    def of(cls, outcomes: Outcomes, *, valid: bool = True) -> Score:
        """The score that outcomes make."""
        return cls(
            value(outcomes),
            outcomes.n,
            standard_error(outcomes),
            interval(outcomes),
            outcomes.metric,
            outcomes.higher_is_better,
            valid,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as they enter the record."""
        plain = dataclasses.asdict(self)
        return {**plain, "interval": None if self.interval is None else list(self.interval)}


def normalise(text: str) -> str:
    """``text`` casefolded and stripped, white space inside it made single spaces, punctuation at its end removed.

    Models like to end an answer with a full stop; inside a text or in front of it punctuation means something.
    """
    return " ".join(text.casefold().split()).rstrip(string.punctuation + " ")


def exact_match(answers: Sequence[str], references: Sequence[str]) -> Outcomes:
    """Answers that equal their reference after ``normalise``.

    Args:
        answers: what the model said.
        references: what was expected, in the same order; at least one.
    """
    hits = [normalise(answer) == normalise(reference) for answer, reference in zip(answers, references, strict=True)]
    return _shares(hits, "exact_match")


def _shares(hits: Sequence[bool], metric: str) -> Outcomes:
    return Outcomes(metric, True, _UNNAMED, tuple(map(float, hits)))


def word_error_rate(answers: Sequence[str], references: Sequence[str]) -> Outcomes:
    """Corpus word error rate: substitutions, deletions and insertions of all utterances over all reference words.

    Texts are normalised word by word (``normalise``).

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
    errors = [float(_num_errors(chunks)) for chunks in jiwer.process_words(wanted, said).alignments]
    words = [float(len(text.split())) for text in wanted]
    return Outcomes("wer", False, _UNNAMED, tuple(errors), tuple(words))


def _words(text: str) -> str:
    return " ".join(word for word in map(normalise, text.split()) if word)


def _num_errors(chunks: Sequence[Any]) -> int:
    """Edits of one utterance: an inserted stretch has no reference words, any other wrong one counts those it has."""
    return sum(
        max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for chunk in chunks
        if chunk.type != "equal"
    )


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> Outcomes:
    """Token perplexity exp(sum of nll / sum of tokens).

    Args:
        nll: negative log-likelihood of each passage in nats.
        num_tokens: predicted tokens of each passage.

    Raises:
        DataError: no token is predicted at all.
    """
    if not sum(num_tokens):
        raise DataError("perplexity needs passages of more than one token", value=f"{len(nll)} passages without")
    return Outcomes("perplexity", False, _UNNAMED, tuple(nll), tuple(map(float, num_tokens)), "exp")


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


def accuracy(judged: Sequence[Judged]) -> Outcomes:
    """Samples whose right choice is more likely than every other; a tie counts as wrong.

    Args:
        judged: at least one sample.

    Raises:
        NumericalError: a log-likelihood is NaN or infinite.
    """
    return _shares([preferred(one.log_likelihoods) == one.right for one in judged], "acc")


def normalised_accuracy(judged: Sequence[Judged]) -> Outcomes:
    """``accuracy`` by log-likelihood per byte, so that a choice does not win by being short.

    lm-eval's ``acc_norm`` counts characters, which is the same in ASCII.

    Args:
        judged: at least one sample.

    Raises:
        NumericalError: a log-likelihood is NaN or infinite.
    """
    return _shares([preferred(one.per_byte) == one.right for one in judged], "acc_norm")


def num_ties(judged: Sequence[Judged]) -> int:
    """How many samples have several best choices, in total or per byte."""
    return sum(None in (preferred(one.log_likelihoods), preferred(one.per_byte)) for one in judged)


ANSWER_METRICS: Registry[Callable[[Sequence[str], Sequence[str]], Outcomes]] = Registry("metric of answers")
ANSWER_METRICS.register("exact_match", exact_match)
ANSWER_METRICS.register("wer", word_error_rate)

CHOICE_METRICS: Registry[Callable[[Sequence[Judged]], Outcomes]] = Registry("metric of choices")
CHOICE_METRICS.register("acc", accuracy)
CHOICE_METRICS.register("acc_norm", normalised_accuracy)
