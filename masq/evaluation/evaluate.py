"""Scores of one model on its tasks: answers where a task asks for them, likelihoods of texts where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from masq.calibration.data import batches as batches_of
from masq.errors import DataError
from masq.evaluation.batch_store import BatchStore, Progress, ProgressLog, named_batches, run_batches
from masq.evaluation.generation import Answer, generate_answers, health
from masq.evaluation.likelihood import answer_nll, choice_nll
from masq.evaluation.scoring import ANSWER_METRICS, CHOICE_METRICS, Judged, Score, num_ties, perplexity
from masq.evaluation.tasks import TASKS, check_tasks

if TYPE_CHECKING:
    from pathlib import Path

    from masq.evaluation.config import EvaluationConfig
    from masq.models.base import ModelAdapter, Sample


@dataclass
class EvaluationResult:
    """What came out.

    Attributes:
        scores: metric by task and name.
        health: per task with generated answers: ``n`` and how many are empty, truncated, repeating; ``failed`` counts
            those that are any of it.
        warnings: one sentence for each score that is not valid, and for ties among choices.
    """

    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def evaluate(
    adapter: ModelAdapter,
    samples: Sequence[Sample],
    config: EvaluationConfig,
    folder: Path,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score a model.

    Finished batches are kept under ``folder`` and reused; a resumed evaluation ends bit-identical.

    Args:
        adapter: the model; with quantized linears, the modality hook is already installed.
        samples: the evaluation set. ``config.samples_per_task`` has been applied by ``load_samples``.
        config: batch size, answer length, largest share of failed answers.
        folder: of this model's run; it must not be shared between models.
        progress: told after every batch; logs a line by default.

    Returns:
        Scores, health and warnings, tasks in the order of the samples.

    Raises:
        ConfigError: a task that no line of ``tasks.TASKS`` describes.
        DataError: no samples at all, or samples that their task cannot score.
    """
    if not samples:
        raise DataError("an evaluation needs at least one sample", value=0)
    check_tasks(samples)
    kinds = {task: TASKS.get(task) for task in dict.fromkeys(sample.task for sample in samples)}
    progress = progress or ProgressLog()
    batches = named_batches(batches_of(samples, config.batch_size))
    generated, read, judged = (
        [batch for batch in batches if kinds[batch[1][0].task].mode == mode]
        for mode in ("generate", "likelihood", "choose")
    )
    answers = generate_answers(adapter, generated, config.max_new_tokens, folder / "answers", progress)
    likelihoods = _likelihoods(adapter, read, folder / "likelihood", progress)
    choices = _choices(adapter, judged, folder / "choices", progress)
    by_id = {answer.id: answer for answer in answers}
    result = EvaluationResult()
    for task, kind in kinds.items():
        chosen = [sample for sample in samples if sample.task == task]
        if kind.mode == "generate":
            _score_answers(result, task, chosen, [by_id[sample.id] for sample in chosen], config.max_failure_share)
        elif kind.mode == "choose":
            _score_choices(result, task, chosen, [choices[sample.id] for sample in chosen])
        else:
            entries = [likelihoods[sample.id] for sample in chosen]
            score = perplexity([entry["nll"] for entry in entries], [entry["num_tokens"] for entry in entries])
            result.scores[task] = {score.metric: score}
    return result


def _likelihoods(
    adapter: ModelAdapter, batches: Sequence[tuple[str, Sequence[Sample]]], folder: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Summed NLL and number of predicted tokens by sample id."""

    def compute(samples: Sequence[Sample]) -> list[dict[str, Any]]:
        nll, counts = answer_nll(adapter, adapter.encode(samples, with_answer=True))
        return [
            {"id": sample.id, "nll": value, "num_tokens": count}
            for sample, value, count in zip(samples, nll, counts, strict=True)
        ]

    entries = run_batches("likelihood", batches, compute, BatchStore(folder), progress)
    return {entry["id"]: entry for entry in entries}


def _choices(
    adapter: ModelAdapter, batches: Sequence[tuple[str, Sequence[Sample]]], folder: Path, progress: Progress
) -> dict[str, list[float]]:
    """Summed NLL of every choice by sample id."""

    def compute(samples: Sequence[Sample]) -> list[dict[str, Any]]:
        nll = choice_nll(adapter, adapter.encode_choices(samples))
        return [{"id": sample.id, "nll": values} for sample, values in zip(samples, nll, strict=True)]

    entries = run_batches("choices", batches, compute, BatchStore(folder), progress)
    return {entry["id"]: entry["nll"] for entry in entries}


def _score_choices(
    result: EvaluationResult, task: str, samples: Sequence[Sample], nll: Sequence[Sequence[float]]
) -> None:
    """Add scores and, if choices tie, a warning."""
    judged = [
        Judged(
            tuple(-value for value in values),
            tuple(len(choice.encode()) for choice in sample.choices),
            sample.choices.index(sample.answer),
        )
        for sample, values in zip(samples, nll, strict=True)
    ]
    scores = [CHOICE_METRICS.get(name)(judged) for name in TASKS.get(task).metrics]
    result.scores[task] = {score.metric: score for score in scores}
    if ties := num_ties(judged):
        result.warnings.append(f"{task}: {ties} of {len(judged)} samples have several best choices and count as wrong")


def _score_answers(
    result: EvaluationResult,
    task: str,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    max_failure_share: float,
) -> None:
    """Add scores, health and, if too many answers failed, a warning."""
    counts = health(answers)
    valid = counts["failed"] <= max_failure_share * counts["n"]
    if not valid:
        result.warnings.append(
            f"{task}: {counts['failed']} of {counts['n']} answers failed ({counts['empty']} empty, "
            f"{counts['truncated']} truncated, {counts['repeating']} repeating), more than the allowed share "
            f"{max_failure_share:g}: its scores are not valid"
        )
    texts, references = [answer.text for answer in answers], [sample.answer for sample in samples]
    scores = [ANSWER_METRICS.get(name)(texts, references) for name in TASKS.get(task).metrics]
    result.scores[task] = {score.metric: replace(score, valid=valid) for score in scores}
    result.health[task] = dict(counts)
