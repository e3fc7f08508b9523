from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masq.errors import ConfigError, DataError
from masq.evaluation.config import EvaluationConfig
from masq.evaluation.evaluate import EvaluationResult, evaluate
from masq.evaluation.likelihood import head_inputs
from masq.evaluation.outcomes import hash_samples
from masq.evaluation.statistics import value
from masq.models.base import ModelAdapter, Sample
from tests.evaluation.conftest import naive_nll

Make = Callable[..., ModelAdapter]
CONFIG = EvaluationConfig(batch_size=2, max_new_tokens=3, max_failure_share=1.0)


@pytest.fixture
def adapter(make_model: Make) -> ModelAdapter:
    return make_model()


def test_perplexity_is_that_of_a_plain_loop(adapter: ModelAdapter, samples: list[Sample], tmp_path: Path) -> None:
    prose = [sample for sample in samples if sample.task == "prose"]
    values = [value for sample in prose for value in naive_nll(adapter, sample)]
    score = evaluate(adapter, prose, CONFIG, tmp_path).scores["prose"]["perplexity"]
    assert score.value == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-5)
    assert score.n == len(prose)
    assert not (tmp_path / "answers").exists(), "prose is not generated"


def test_head_inputs_give_the_models_own_logits(adapter: ModelAdapter, samples: list[Sample]) -> None:
    batch = adapter.encode(samples[:3], with_answer=True)
    rows = head_inputs(adapter, batch)
    with torch.no_grad():
        logits = adapter.model(**batch.inputs, use_cache=False).logits
        assert torch.allclose(adapter.head()(rows), logits[:, :-1][batch.answer_mask[:, 1:]], atol=1e-5)
    assert not adapter.head()._forward_pre_hooks


def test_scores_and_health_of_every_task(adapter: ModelAdapter, samples: list[Sample], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = evaluate(adapter, samples, CONFIG, tmp_path, lambda *event: seen.append(event))
    metrics = {task: list(scores) for task, scores in result.scores.items()}
    assert metrics == {
        "digits": ["exact_match"],
        "speech": ["exact_match", "wer"],
        "same": ["exact_match"],
        "prose": ["perplexity"],
    }
    assert list(result.health) == ["digits", "speech", "same"]
    assert all(counts["n"] == 3 for counts in result.health.values())
    assert seen == [("answers", done, 6) for done in range(7)] + [("loglikelihood", done, 1) for done in range(2)]
    assert set(result.versions) == {"lmms-eval", "lm-eval"}
    assert result.tasks["prose"] == {"version": "1.0"}
    assert result.tasks["speech"] == {"version": "1.0", "max_new_tokens": 3, "until": [], "ignored": {}}
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    tasks = [f"masq_{task}-3" for task in ("digits", "same", "speech")]
    assert names == [f"{task}-{number:04d}.json" for task in tasks for number in range(2)]


def test_choices_are_judged_as_if_each_were_alone(adapter: ModelAdapter, choices: list[Sample], tmp_path: Path) -> None:
    expected = [
        [sum(naive_nll(adapter, replace(sample, answer=choice))) for choice in sample.choices] for sample in choices
    ]
    result = evaluate(adapter, choices, CONFIG, tmp_path)
    assert list(result.scores["choice"]) == ["acc_norm", "acc"]
    for metric, sizes in (("acc", [[1] * 3] * 3), ("acc_norm", [list(map(len, one.choices)) for one in choices])):
        right = [
            sample.answer == sample.choices[min(range(len(nll)), key=lambda i: nll[i] / size[i])]  # noqa: B023
            for sample, nll, size in zip(choices, expected, sizes, strict=True)
        ]
        score = result.scores["choice"][metric]
        assert (score.value, score.n, score.metric) == (sum(right) / 3, 3, metric)
    assert not result.health and not result.warnings
    [file] = (tmp_path / "likelihood" / "loglikelihood").iterdir()
    found = [entry["result"][0] for entry in json.loads(file.read_text())["results"]]
    assert found == pytest.approx([-value for values in expected for value in values], rel=1e-5)


def test_a_model_without_preferences_is_wrong_and_said_to_be(adapter: ModelAdapter, tmp_path: Path) -> None:
    with torch.no_grad():
        adapter.head().weight.zero_()
    flat = [
        Sample("a", "choice", "c", "xy", choices=("xy", "zz")),
        Sample("b", "choice", "c", "xy", choices=("z", "xy")),
    ]
    result = evaluate(adapter, flat, CONFIG, tmp_path)
    assert {name: score.value for name, score in result.scores["choice"].items()} == {"acc_norm": 0.5, "acc": 0.0}
    assert result.warnings == ["choice: 1 of 2 samples have several best choices and count as wrong"]


def test_choices_resume_bit_identical(
    adapter: ModelAdapter, choices: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(name: str, done: int, _total: int) -> None:
        if (name, done) == ("loglikelihood", 1):
            raise KeyboardInterrupt

    monkeypatch.setattr("masq.evaluation.language.BATCHES_TOGETHER", 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(adapter, choices, CONFIG, tmp_path / "killed", killed)
    assert len(list((tmp_path / "killed" / "likelihood" / "loglikelihood").iterdir())) == 1
    resumed = asdict(evaluate(adapter, choices, CONFIG, tmp_path / "killed"))
    assert resumed == asdict(evaluate(adapter, choices, CONFIG, tmp_path / "undisturbed"))
    name = "likelihood/loglikelihood/masq_choice-0001.json"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


class Parrot:
    """Answers with what it is told, token by token; token 0 ends an answer."""

    end_ids = (0,)

    def __init__(self, answers: dict[str, list[int]]) -> None:
        self.answers = answers

    def encode_conversations(self, conversations: Any) -> Any:
        return conversations

    def generate(self, conversations: Any, max_new_tokens: int, _max_seconds: float | None = None) -> list[list[int]]:
        return [self.answers[one.texts[0]][:max_new_tokens] for one in conversations]

    def decode(self, ids: Any) -> str:
        return " ".join(f"w{i}" for i in ids if i)


def score(answers: dict[str, list[int]], share: float, folder: Path) -> EvaluationResult:
    config = EvaluationConfig(batch_size=3, max_new_tokens=4, max_failure_share=share)
    samples = [Sample(name, "speech", name, "w1 w2") for name in answers]
    model: Any = Parrot(answers)
    return evaluate(model, samples, config, folder)


ANSWERS = {"right": [1, 2, 0], "wrong": [1, 3, 0], "empty": [0], "runs": [5, 6, 7, 8, 9]}


def test_scores_by_hand(tmp_path: Path) -> None:
    result = score(ANSWERS, 0.5, tmp_path)
    assert result.scores["speech"]["exact_match"].value == 0.25
    assert result.scores["speech"]["wer"].value == (0 + 1 + 2 + 4) / 8
    assert result.health["speech"] == {"n": 4, "empty": 1, "truncated": 1, "repeating": 0, "failed": 2}


def test_too_many_failures_make_a_score_invalid_but_keep_it(tmp_path: Path) -> None:
    fine = score(ANSWERS, 0.5, tmp_path / "a")
    assert not fine.warnings
    assert all(one.valid for one in fine.scores["speech"].values())
    poor = score(ANSWERS, 0.49, tmp_path / "b")
    assert not any(one.valid for one in poor.scores["speech"].values())
    assert poor.scores["speech"]["exact_match"].value == 0.25
    assert poor.scores["speech"]["exact_match"].to_dict()["valid"] is False
    [warning] = poor.warnings
    assert warning.startswith("speech: 2 of 4 answers failed (1 empty, 1 truncated, 0 repeating)")


def test_a_model_that_repeats_itself_has_no_valid_score(tmp_path: Path) -> None:
    result = score({"one": [5, 5, 5, 5, 5], "two": [5, 5, 5, 5, 0]}, 0.5, tmp_path)
    assert result.health["speech"] == {"n": 2, "empty": 0, "truncated": 2, "repeating": 2, "failed": 2}
    assert not any(one.valid for one in result.scores["speech"].values())


def test_a_batch_that_runs_out_of_time_is_cut_and_said_to_be(
    adapter: ModelAdapter, samples: list[Sample], tmp_path: Path
) -> None:
    whole = evaluate(adapter, samples, CONFIG, tmp_path / "whole")
    patient = evaluate(adapter, samples, replace(CONFIG, batch_seconds=1e6), tmp_path / "patient")
    assert patient.outcomes == whole.outcomes
    assert not patient.warnings
    hasty = evaluate(adapter, samples, replace(CONFIG, batch_seconds=1e-9, max_failure_share=0.5), tmp_path / "hasty")
    assert hasty.tasks["speech"]["cut_by_time"] == 3
    assert hasty.health["speech"]["truncated"] == 3
    assert not hasty.scores["speech"]["exact_match"].valid
    assert any(warning.startswith("speech: 3 answers were cut") for warning in hasty.warnings)


def test_outcomes_are_those_of_the_samples(adapter: ModelAdapter, samples: list[Sample], tmp_path: Path) -> None:
    result = evaluate(adapter, samples, CONFIG, tmp_path)
    for task, by in result.outcomes.items():
        own = [sample for sample in samples if sample.task == task]
        for metric, outcomes in by.items():
            assert outcomes.samples == hash_samples(sample.id for sample in own)
            assert value(outcomes) == result.scores[task][metric].value
            assert outcomes.n == result.scores[task][metric].n == len(own)
    assert result.outcomes["digits"]["exact_match"].answers is not None
    assert result.outcomes["prose"]["perplexity"].transform == "exp"
    twice = [replace(one, id=f"{one.id}-{again}") for one in samples if one.task == "digits" for again in (0, 1)]
    grouped = evaluate(adapter, twice, CONFIG, tmp_path / "twice").outcomes["digits"]["exact_match"]
    assert grouped.groups == (0, 0, 1, 1, 2, 2), "questions about one picture are not independent"


def test_resume_is_bit_identical(adapter: ModelAdapter, samples: list[Sample], tmp_path: Path) -> None:
    undisturbed = asdict(evaluate(adapter, samples, CONFIG, tmp_path / "one"))
    files = sorted(path for path in (tmp_path / "one").rglob("*.json"))
    assert len(files) == 7
    for path in files[::2]:
        path.unlink()
    assert asdict(evaluate(adapter, samples, CONFIG, tmp_path / "one")) == undisturbed


@pytest.mark.parametrize(("stage", "at", "left"), [("answers", 2, 2), ("loglikelihood", 1, 7)])
def test_killed_between_batches(
    adapter: ModelAdapter, samples: list[Sample], tmp_path: Path, stage: str, at: int, left: int
) -> None:
    def killed(name: str, done: int, _total: int) -> None:
        if (name, done) == (stage, at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(adapter, samples, CONFIG, tmp_path / "killed", killed)
    assert len(list((tmp_path / "killed").rglob("*.json"))) == left
    resumed = evaluate(adapter, samples, CONFIG, tmp_path / "killed")
    assert asdict(resumed) == asdict(evaluate(adapter, samples, CONFIG, tmp_path / "undisturbed"))


def test_damaged_batches_are_computed_again(
    adapter: ModelAdapter, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = asdict(evaluate(adapter, samples, CONFIG, tmp_path))
    for name in ("answers/masq_digits-3-0001.json", "likelihood/loglikelihood/masq_prose-0000.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-20])
    assert asdict(evaluate(adapter, samples, CONFIG, tmp_path)) == first
    assert caplog.text.count("is damaged and is computed again") == 2


def test_unknown_task_fails_before_any_work(adapter: ModelAdapter, samples: list[Sample], tmp_path: Path) -> None:
    strange = [*samples, Sample("x", "speach", "q", "a")]
    with pytest.raises(ConfigError, match="unknown task.*Did you mean speech"):
        evaluate(adapter, strange, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_score(adapter: ModelAdapter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        evaluate(adapter, [], CONFIG, tmp_path)
