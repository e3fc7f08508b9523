"""Error rates of transcripts over a whole corpus, in characters, words, or both."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import jiwer

from masq.errors import ConfigError, DataError

Unit = Literal["character", "word", "mixed"]

# Kana and Chinese characters: scripts without spaces between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_MIXED = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "character": lambda text: list("".join(text.split())),
    "word": str.split,
    "mixed": _MIXED.findall,
}


def plain_transcript(text: str) -> str:
    """``text`` in NFKC (full-width letters become plain ones), casefolded, without punctuation and symbols.

    Letters, marks and digits of all scripts stay, and apostrophes inside words; all else becomes white space. Numbers
    are not written out: "2" and "two" differ.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = "".join(one if one == "'" or unicodedata.category(one)[0] in "LMN" else " " for one in folded)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def transcript_errors(
    answers: Sequence[str],
    references: Sequence[str],
    unit: Unit,
    normalise: Callable[[str], str] = plain_transcript,
) -> tuple[list[float], list[float]]:
    """Edits (substitutions, deletions, insertions) and reference units of every utterance.

    Args:
        answers: what the model said.
        references: what was said, in the same order; at least one.
        unit: ``character`` (spaces do not count), ``word`` (between spaces), or ``mixed``: a kana or Chinese character
            is a unit, and between them a word is.
        normalise: applied to both.

    Returns:
        Edits and counts, in the order of the utterances; the rate of the corpus is the ratio of their sums.

    Raises:
        ConfigError: an unknown unit.
        DataError: a reference without units, for which no rate is defined.
    """
    if unit not in _SPLIT:
        raise ConfigError(f"a unit must be one of {', '.join(_SPLIT)}", value=unit)
    edits, counts = [], []
    for answer, reference in zip(answers, references, strict=True):
        wanted, said = (_SPLIT[unit](normalise(text)) for text in (reference, answer))
        if not wanted:
            raise DataError(
                "an error rate needs references with words in them",
                value=repr(reference),
                remedy="correct the data",
            )
        found = jiwer.process_words(" ".join(wanted), " ".join(said))
        edits.append(float(found.substitutions + found.deletions + found.insertions))
        counts.append(float(len(wanted)))
    return edits, counts


def corpus_error_rate(
    answers: Sequence[str],
    references: Sequence[str],
    unit: Unit,
    normalise: Callable[[str], str] = plain_transcript,
) -> float:
    """Edits of all utterances over all reference units: CER for characters, WER for words, MER for both mixed.

    It weighs utterances by their length and may exceed 1, unlike a mean of rates that are capped one by one.

    Args:
        answers: what the model said.
        references: what was said, in the same order; at least one.
        unit: see ``transcript_errors``.
        normalise: applied to both; by default NFKC, casefolded, without punctuation (``plain_transcript``).

    Raises:
        ConfigError: an unknown unit.
        DataError: a reference without units, or no utterance at all.
    """
    edits, counts = transcript_errors(answers, references, unit, normalise)
    if not counts:
        raise DataError("an error rate needs at least one utterance", value=0)
    return sum(edits) / sum(counts)
