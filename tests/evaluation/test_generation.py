from __future__ import annotations

from typing import Any

import pytest

from masq.evaluation.generation import Answer, ends_in_loop, health, read_answer


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([], False),
        ([7, 7, 7], False),
        ([7, 7, 7, 7], True),
        ([1, 2, 7, 7, 7, 7], True),
        ([7, 7, 7, 7, 1], False),
        ([1, 2] * 4, True),
        ([9, *[1, 2] * 4], True),
        ([1, 2] * 3, False),
        ([1, 2, 3] * 4, True),
        (list(range(12)), False),
    ],
)
def test_loops(ids: list[int], loops: bool) -> None:
    assert ends_in_loop(ids) is loops


def test_health_counts_each_failure_once() -> None:
    answers = [
        Answer("a", "yes", 2, truncated=False, repeating=False),
        Answer("b", " .\n", 2, truncated=False, repeating=False),
        Answer("c", "no no no no", 4, truncated=True, repeating=True),
        Answer("d", "on and on", 4, truncated=True, repeating=False),
        Answer("e", "", 4, truncated=True, repeating=False),
    ]
    assert health(answers) == {"n": 5, "empty": 2, "truncated": 3, "repeating": 1, "failed": 4}


class Spelling:
    """Tokens are letters, token 0 ends an answer."""

    end_ids = (0,)

    @staticmethod
    def decode(ids: Any) -> str:
        return "".join(chr(ord("a") + i) for i in ids if i)


def test_answers_are_judged_by_their_tokens() -> None:
    model: Any = Spelling()
    assert read_answer(model, "x", [1, 2, 0]) == Answer("x", "bc", 3, truncated=False, repeating=False)
    assert read_answer(model, "x", [0]).empty
    runs = read_answer(model, "x", [1, 2, 3, 4, 5])
    assert (runs.truncated, runs.num_tokens) == (True, 5)
    assert read_answer(model, "x", [3, 3, 3, 3, 0]).repeating
    right = read_answer(model, "x", [4] * 4 + [0], expected="eeee")
    assert not right.failed, "an expected answer is no failure, however it looks"


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it() -> None:
    model: Any = Spelling()
    cut = read_answer(model, "x", [1, 2, 3, 4], until=["zz", "d"])
    assert (cut.text, cut.truncated) == ("bc", False)
    assert read_answer(model, "x", [1, 2, 3, 4], until=["", "zz"]).text == "bcde"
