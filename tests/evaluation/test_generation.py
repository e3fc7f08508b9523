from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masq.evaluation.batch_store import named_batches
from masq.evaluation.generation import Answer, ends_in_loop, generate_answers, health
from masq.models.base import ModelAdapter, Sample


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress."""


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


class Scripted:
    """Generates what it is told to; encodes nothing."""

    end_ids = (0,)

    def __init__(self, script: dict[str, list[int]]) -> None:
        self.script = script
        self.asked: list[str] = []

    def encode(self, samples: Any, *, with_answer: bool) -> Any:
        assert not with_answer
        return samples

    def generate(self, samples: Any, max_new_tokens: int) -> list[list[int]]:
        self.asked += [sample.id for sample in samples]
        return [self.script[sample.id][:max_new_tokens] for sample in samples]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + i) for i in ids if i)


def test_answers_are_judged_by_their_tokens(tmp_path: Path) -> None:
    script = {
        "ends": [1, 2, 0],
        "empty": [0],
        "runs": [1, 2, 3, 4, 5, 6],
        "loops": [3, 3, 3, 3, 0],
        "right": [4] * 4 + [0],
    }
    samples = [Sample(name, "digits", "q", "eeee" if name == "right" else "x") for name in script]
    model: Any = Scripted(script)
    answers = {a.id: a for a in generate_answers(model, named_batches([samples]), 5, tmp_path, silent)}
    assert answers["ends"] == Answer("ends", "bc", 3, truncated=False, repeating=False)
    assert answers["empty"].empty
    assert (answers["runs"].truncated, answers["runs"].num_tokens) == (True, 5)
    assert answers["loops"].repeating
    assert not answers["right"].failed, "an expected answer is no failure, however it looks"


def test_finished_batches_are_not_asked_again(tmp_path: Path) -> None:
    model: Any = Scripted({f"s{index}": [1, 2, 0] for index in range(4)})
    samples = [Sample(f"s{index}", "digits", "q", "x") for index in range(4)]
    batches = named_batches([samples[:2], samples[2:]])
    first = generate_answers(model, batches, 5, tmp_path, silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-0000.json", "digits-0001.json"]
    (tmp_path / "digits-0001.json").unlink()
    assert generate_answers(model, batches, 5, tmp_path, silent) == first
    assert model.asked == ["s0", "s1", "s2", "s3", "s2", "s3"]
    generate_answers(model, batches, 6, tmp_path, silent)
    assert len(model.asked) == 10, "another limit of new tokens is another evaluation"


def test_an_error_is_not_an_empty_answer(tmp_path: Path) -> None:
    model: Any = Scripted({})
    with pytest.raises(KeyError):
        generate_answers(model, named_batches([[Sample("s", "digits", "q", "x")]]), 5, tmp_path, silent)
    assert not list(tmp_path.iterdir())


def test_a_real_model_answers(make_model: Callable[..., ModelAdapter], samples: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    chosen = [sample for sample in samples if sample.task == "same"]
    answers = generate_answers(adapter, named_batches([chosen]), 4, tmp_path, silent)
    expected = adapter.generate(adapter.encode(chosen, with_answer=False), 4)
    assert [answer.text for answer in answers] == [adapter.decode(ids) for ids in expected]
    assert [answer.num_tokens for answer in answers] == [len(ids) for ids in expected]
    assert [answer.truncated for answer in answers] == [ids[-1] not in adapter.end_ids for ids in expected]
