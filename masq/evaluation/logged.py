"""What the harnesses log of every sample, as numerators and denominators of their metrics.

Each function takes the logged samples of one task (``log_samples=True``) in the order of the documents. Where a harness
judges an answer while it aggregates, its own functions judge here too, sample by sample.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from masq.errors import DataError
from masq.evaluation.outcomes import digests
from masq.evaluation.transcripts import plain_transcript, transcript_errors

Logged = Mapping[str, Any]
Columns = tuple[list[float], list[float] | None]
"""Numerators and denominators by sample; None stands for denominators that are all 1."""


def answer(one: Logged) -> str:
    """The answer to one sample as the task scored it."""
    response = one["filtered_resps"][0]
    return str(response[0] if isinstance(response, list | tuple) else response).strip()


def answer_digests(logged: Sequence[Logged]) -> tuple[str, ...]:
    """Digests of all answers (``outcomes.digests``)."""
    return digests(answer(one) for one in logged)


def choice_digests(logged: Sequence[Logged]) -> tuple[str, ...]:
    """Digests of the choice with the largest log-likelihood, the first of several."""
    likelihoods = [[float(value) for value, _ in one["filtered_resps"]] for one in logged]
    return digests(str(values.index(max(values))) for values in likelihoods)


def share(metric: str, factor: float = 1.0) -> Callable[[Sequence[Logged]], Columns]:
    """Reader of a number that the harness logs for every sample and averages, divided by ``factor``."""

    def columns(logged: Sequence[Logged]) -> Columns:
        return [float(one[metric]) / factor for one in logged], None

    return columns


def word_likelihoods(logged: Sequence[Logged]) -> Columns:
    """NLL in nats and number of words of the original text, of lm-eval's ``wikitext``."""
    pairs = [one["word_perplexity"] for one in logged]
    return [-float(likelihood) for likelihood, _ in pairs], [float(words) for _, words in pairs]


def ocrbench_hits(logged: Sequence[Logged]) -> Columns:
    """Whether a reference is part of the answer."""
    return [float(one["ocrbench_accuracy"]["score"]) for one in logged], None


def omnibench_hits(logged: Sequence[Logged]) -> Columns:
    """Whether the letter is the right one."""
    return [float(one["accuracy"]["overall"]) for one in logged], None


def omnibench_unparsable(logged: Sequence[Logged]) -> list[bool]:
    """Which answers hold no letter; they are wrong."""
    from lmms_eval.tasks.omni_bench.utils import parse_multi_choice_response

    return [parse_multi_choice_response(answer(one), ["A", "B", "C", "D"]) is None for one in logged]


def mmmu_hits(logged: Sequence[Logged]) -> Columns:
    """Whether the parsed answer is right, as the harness judges it; guesses that it made are kept."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    judged: list[Any] = [evaluate_mmmu([one["mmmu_acc"]]) for one in logged]
    return [float(metrics["acc"]) for _, metrics in judged], None


def mmmu_unparsable(logged: Sequence[Logged]) -> list[bool]:
    """Which answers to multiple-choice questions hold no choice: the harness draws one at random for them.

    Its parser is asked again and watched for whether it draws; the state of ``random`` is put back.
    """
    from lmms_eval.tasks.mmmu.utils import get_multi_choice_info, parse_multi_choice_response

    state, guessed = random.getstate(), []
    for one in logged:
        if one["doc"]["question_type"] != "multiple-choice":
            guessed.append(False)
            continue
        letters, choices = get_multi_choice_info(ast.literal_eval(one["doc"]["options"]))
        random.setstate(state)
        parse_multi_choice_response(answer(one), choices, letters)
        guessed.append(random.getstate() != state)
    random.setstate(state)
    return guessed


def librispeech_errors(logged: Sequence[Logged]) -> Columns:
    """Word edits and reference words after the harness' own text normalisation (Whisper's English one).

    Raises:
        DataError: speech in another language than English, which the harness normalises otherwise.
    """
    entries = [one["wer"] for one in logged]
    others = {one["task"] for one in entries} - {"asr_en"}
    if others:
        raise DataError("words are counted for English speech alone", value=", ".join(sorted(others)))
    normalise = _english_normaliser()
    return transcript_errors(
        [one["pred"] for one in entries], [one["gt"] for one in entries], "word", normalise=normalise
    )


def _english_normaliser() -> Callable[[str], str]:
    """What lmms-eval does to a reference and an answer before it counts words, by its own parts."""
    from lmms_eval.tasks.librispeech import utils

    tokenizer = utils.EvaluationTokenizer("none", lowercase=True, punctuation_removal=True)

    def normalise(text: str) -> str:
        plain = utils.basic_normalizer(utils.english_normalizer(utils.remove_sp(text, "en")))
        return tokenizer.tokenize(plain)

    return normalise


def wenetspeech_errors(logged: Sequence[Logged]) -> Columns:
    """Character edits and reference characters of Chinese speech.

    Normalised twice: numbers are written out as lmms-eval does it wherever it counts Chinese characters (speechio's
    chinese_text_normalization), then ``plain_transcript``.
    """
    from lmms_eval.tasks.librispeech.utils import chinese_normalizer

    def normalise(text: str) -> str:
        return plain_transcript(chinese_normalizer(text))

    return transcript_errors(
        [answer(one) for one in logged], [str(one["doc"]["text"]) for one in logged], "character", normalise=normalise
    )


def pictures(column: str) -> Callable[[Sequence[Logged]], list[Any]]:
    """Reader of what a sample shares with others: several questions about one picture are not independent."""

    def labels(logged: Sequence[Logged]) -> list[Any]:
        return [one["doc"][column] for one in logged]

    return labels
