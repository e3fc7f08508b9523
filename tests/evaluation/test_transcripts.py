"""Error rates of a corpus: by hand, against a plain recursion, and what they must not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masq.errors import ConfigError, DataError
from masq.evaluation.transcripts import Unit, corpus_error_rate, plain_transcript, transcript_errors

UNITS: tuple[Unit, ...] = ("character", "word", "mixed")
texts = st.text(alphabet="ab 你好。,'", max_size=12)
references = texts.filter(lambda text: plain_transcript(text) != "")
pairs = st.lists(st.tuples(texts, references), min_size=1, max_size=5)


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein's distance as it is defined."""

    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        changed = first[i - 1] != second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + changed)

    return distance(len(first), len(second))


@pytest.mark.parametrize(
    ("answer", "reference", "unit", "rate"),
    [
        ("今天天气好", "今天天气很好", "character", 1 / 6),
        ("今天，天气很好。", "今天天气很好", "character", 0),
        ("今 天 天气很好", "今天天气很好", "character", 0),
        ("ＯＫ", "ok", "character", 0),
        ("a quiet tone", "A quiet, quiet tone!", "word", 1 / 4),
        ("don\u2019t", "don't", "word", 0),
        ("我 用 python", "我用Python", "mixed", 0),
        ("我用 java", "我用 python", "mixed", 1 / 3),
        ("我用 java", "我用 python", "character", 6 / 8),
        ("", "你好", "character", 1),
        ("你好你好你好", "你好", "character", 2),
    ],
)
def test_rates_counted_by_hand(answer: str, reference: str, unit: Unit, rate: float) -> None:
    assert corpus_error_rate([answer], [reference], unit) == pytest.approx(rate)


def test_long_utterances_weigh_more() -> None:
    """The mean over utterances would be one half."""
    assert corpus_error_rate(["好", "今天天气很"], ["坏", "今天天气很"], "character") == pytest.approx(1 / 6)


@given(pairs)
@pytest.mark.parametrize("unit", UNITS)
def test_edits_are_levenshteins(unit: Unit, chosen: list[tuple[str, str]]) -> None:
    split = {
        "character": lambda text: list(text.replace(" ", "")),
        "word": str.split,
        "mixed": lambda text: "".join(f" {one} " if one in "你好" else one for one in text).split(),
    }[unit]
    answers, wanted = ([pair[at] for pair in chosen] for at in range(2))
    found, counts = transcript_errors(answers, wanted, unit)
    plain = [[split(plain_transcript(text)) for text in pair] for pair in chosen]
    assert found == [edits(tuple(said), tuple(spoken)) for said, spoken in plain]
    assert counts == [len(spoken) for _, spoken in plain]
    assert corpus_error_rate(answers, wanted, unit) == sum(found) / sum(counts)


@given(st.lists(references, min_size=1, max_size=5))
@pytest.mark.parametrize("unit", UNITS)
def test_what_was_said_is_no_error(unit: Unit, said: list[str]) -> None:
    assert corpus_error_rate(said, said, unit) == 0


@given(st.text(max_size=8))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = plain_transcript(text)
    assert plain_transcript(once) == once


def test_another_normaliser() -> None:
    assert corpus_error_rate(["B"], ["b"], "word", normalise=str) == 1


def test_what_has_no_rate() -> None:
    with pytest.raises(DataError, match="references with words"):
        corpus_error_rate(["a"], ["。"], "character")
    with pytest.raises(DataError, match="at least one utterance"):
        corpus_error_rate([], [], "word")
    with pytest.raises(ConfigError, match="character, word, mixed"):
        corpus_error_rate(["a"], ["a"], "syllable")  # type: ignore[arg-type]
