"""lm-eval's likelihoods of masq's models are those of a plain loop, and finished requests stay on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from masq.errors import ConfigError, ModelError, NumericalError
from masq.evaluation.harness import evaluate_language
from masq.evaluation.language import MasqLm
from masq.evaluation.local.language_task import LocalTextTask
from masq.models.base import ModelAdapter, Sample
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano
from masq.modules.modality import install
from masq.transforms.frame import HadamardRotation
from masq.transforms.rotation import rotate_model
from tests.evaluation.conftest import naive_nll

Make = Callable[..., ModelAdapter]


def ask(model: MasqLm, *tasks: LocalTextTask) -> Any:
    manager = TaskManager(include_defaults=False)
    return evaluate_language(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


def task(name: str, samples: list[Sample], adapter: ModelAdapter) -> LocalTextTask:
    return LocalTextTask({"task": f"masq_{name}"}, samples, tokenizer=adapter.tokenizer)


def test_perplexity_is_that_of_a_plain_loop(make_model: Make, samples: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    install(adapter)
    prose = [one for one in samples if one.task == "prose"]
    found = ask(MasqLm(adapter, folder=tmp_path, batch_size=2), task("prose", prose, adapter))
    values = [value for one in prose for value in naive_nll(adapter, one)]
    expected = math.exp(sum(values) / len(values))
    assert found["results"]["masq_prose"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_the_machine_is_not_described_a_second_time(
    make_model: Make, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator

    describe, adapter = evaluator.add_env_info, make_model()
    install(adapter)
    prose = [one for one in samples if one.task == "prose"]
    found = ask(MasqLm(adapter, folder=tmp_path, batch_size=2), task("prose", prose, adapter))
    assert "pretty_env_info" not in found
    with pytest.raises(TypeError):
        evaluate_language(no_such_argument=1)
    assert evaluator.add_env_info is describe


@pytest.mark.parametrize("blanks", [" ", "\n\n", "  \n "])
def test_a_passage_may_begin_with_blanks(make_model: Make, samples: list[Sample], tmp_path: Path, blanks: str) -> None:
    """The harness goes on from what is not blank: the tokens up to there are given, the others scored."""
    adapter = make_model()
    install(adapter)
    (first, *_) = [one for one in samples if one.task == "prose"]
    passage = replace(first, answer=blanks + first.answer)
    encoded = adapter.tokenizer(passage.answer, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    given = 1 + next(index for index, end in enumerate(ends) if passage.answer[:end].strip())
    found = ask(MasqLm(adapter, folder=tmp_path, batch_size=2), task("prose", [passage], adapter))
    values = naive_nll(adapter, passage)
    assert len(values) == len(ends) - 1
    scored = values[given - 1 :]
    expected = math.exp(sum(scored) / len(scored))
    assert found["results"]["masq_prose"]["perplexity,none"] == pytest.approx(expected, rel=1e-5)


def test_every_embedded_passage_can_be_scored() -> None:
    """Some begin with a blank of its own token, which crashed the harness."""
    for split in ("evaluation", "final"):
        for name in ("manual", "tale"):
            documents = LocalTextTask({"task": f"masq_{name}"}, split=split).dataset[split]
            assert len(documents) == 400
            assert all(one["start"].strip() and one["rest"] and one["num_tokens"] > 0 for one in documents)


@torch.no_grad()
def test_a_head_of_its_own_is_never_tied(tmp_path: Path) -> None:
    """HFLM ties the weights of models that say they are tied: a rotated model must not say so."""
    adapter = Qwen25VLAdapter(*nano.build("nano_vl", tied=True))
    rotate_model(adapter, HadamardRotation(), seed=0)
    weight = adapter.head().weight.clone()
    MasqLm(adapter, folder=tmp_path)
    assert torch.equal(adapter.head().weight, weight)
    careless = Qwen25VLAdapter(*nano.build("nano_vl", tied=True))
    careless.head().weight = torch.nn.Parameter(careless.head().weight * 2)
    with pytest.raises(ModelError, match="must not be tied"):
        MasqLm(careless, folder=tmp_path)


def test_choices_are_counted_by_hand(make_model: Make, choices: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    found = ask(MasqLm(adapter, folder=tmp_path, batch_size=2), task("choice", choices, adapter))
    right = {"acc": 0, "acc_norm": 0}
    for one in choices:
        nll = [
            sum(naive_nll(adapter, Sample("x", "choice", one.question, c, choices=one.choices))) for c in one.choices
        ]
        per_byte = [value / len(choice) for value, choice in zip(nll, one.choices, strict=True)]
        right["acc"] += one.choices[nll.index(min(nll))] == one.answer
        right["acc_norm"] += one.choices[per_byte.index(min(per_byte))] == one.answer
    scores = found["results"]["masq_choice"]
    assert {name: scores[f"{name},none"] for name in right} == {name: count / 3 for name, count in right.items()}


def test_a_whole_text_is_scored_from_its_first_token(make_model: Make, tmp_path: Path) -> None:
    adapter = make_model()
    model = MasqLm(adapter, folder=tmp_path, batch_size=2)
    text = "Once upon a time there was"
    ids = [model.prefix_token_id, *adapter.tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        log_p = adapter.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = sum(float(log_p[at, ids[at + 1]]) for at in range(len(ids) - 1))
    request = Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1))
    assert model.loglikelihood_rolling([request]) == [pytest.approx(expected, rel=1e-5)]


def test_finished_requests_are_not_asked_again(make_model: Make, tmp_path: Path, monkeypatch: Any) -> None:
    adapter = make_model()
    monkeypatch.setattr("masq.evaluation.language.BATCHES_TOGETHER", 1)
    requests = [
        Instance("loglikelihood", {}, (f"question {document}", f" {word}"), index, metadata=("t", document, 1))
        for document in range(3)
        for index, word in enumerate(("yes", "no"))
    ]
    first = MasqLm(adapter, folder=tmp_path, batch_size=1).loglikelihood(requests)
    files = sorted((tmp_path / "loglikelihood").iterdir())
    assert [path.name for path in files] == ["t-0000.json", "t-0001.json", "t-0002.json"], "choices stay together"
    calls: list[int] = []
    adapter.model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert MasqLm(adapter, folder=tmp_path, batch_size=1).loglikelihood(requests) == first
    assert not calls
    files[1].unlink()
    assert MasqLm(adapter, folder=tmp_path, batch_size=1).loglikelihood(requests) == first
    assert len(calls) == 2
    other = [Instance("loglikelihood", {}, ("question 0", " maybe"), 0, metadata=("t", 0, 1))]
    assert MasqLm(adapter, folder=tmp_path, batch_size=1).loglikelihood(other) != first[:1]


def test_a_broken_model_is_not_a_wrong_choice(make_model: Make, choices: list[Sample], tmp_path: Path) -> None:
    adapter = make_model()
    with torch.no_grad():
        adapter.head().weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="logits must be finite.*masq_choice"):
        ask(MasqLm(adapter, folder=tmp_path, batch_size=2), task("choice", choices, adapter))


def test_bad_values_and_names(make_model: Make) -> None:
    with pytest.raises(ConfigError, match="batch_size must be positive"):
        MasqLm(make_model(), batch_size=0)
    with pytest.raises(ConfigError, match="Run it in lmms-eval"):
        LocalTextTask({"task": "masq_read"}, [])
    folder = Path(__file__).parents[2] / "masq" / "evaluation" / "local" / "language"
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert manager.all_tasks == ["masq_choice", "masq_manual", "masq_tale"]
