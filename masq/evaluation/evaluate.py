"""Scores of one model on its tasks, from what the harnesses saw of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from masq.errors import DataError
from masq.evaluation.batch_store import Progress, ProgressLog
from masq.evaluation.generation import Answer, health
from masq.evaluation.harness import require_harnesses, run_tasks
from masq.evaluation.outcomes import Outcomes, digests, hash_samples, number_groups
from masq.evaluation.scoring import ANSWER_METRICS, CHOICE_METRICS, Judged, Score, normalise, num_ties, perplexity
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
        outcomes: what each made of every sample.
        health: per task with generated answers: ``n`` and how many are empty, truncated, repeating; ``failed`` counts
            those that are any of it.
        warnings: one sentence for each score that is not valid, and for ties among choices.
        versions: of the harnesses that ran.
        tasks: how each task was run, see ``Seen``.
    """

    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Outcomes]] = field(default_factory=dict)
    health: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def warn_of_time(self) -> None:
        """Add a warning for every task some of whose answers were cut because their batch ran out of time."""
        cut = {task: own["cut_by_time"] for task, own in self.tasks.items() if own.get("cut_by_time")}
        self.warnings += [
            f"{task}: {count} answers were cut where their batch ran out of time: other machines cut others"
            for task, count in cut.items()
        ]


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
        ConfigError: a task that no line of ``tasks.TASKS`` describes, or a harness is not installed.
        DataError: no samples at all, or samples that their task cannot score.
    """
    if not samples:
        raise DataError("an evaluation needs at least one sample", value=0)
    check_tasks(samples)
    require_harnesses()
    seen = run_tasks(adapter, samples, config, folder, progress or ProgressLog())
    result = EvaluationResult(versions=seen.versions, tasks=seen.tasks)
    for task in dict.fromkeys(sample.task for sample in samples):
        own = [sample for sample in samples if sample.task == task]
        documents, mode = seen.documents[task], TASKS.get(task).mode
        if mode == "generate":
            _score_answers(result, task, own, documents, seen.answers[task], config.max_failure_share)
        elif mode == "choose":
            _score_choices(result, task, own, documents)
        else:
            _note(result, task, own, perplexity(*zip(*documents, strict=True)))
    result.warn_of_time()
    return result


def _note(result: EvaluationResult, task: str, samples: Sequence[Sample], outcomes: Outcomes, **known: Any) -> None:
    """Add outcomes and the score that they make; samples about one picture or sound belong together."""
    valid = known.pop("valid", True)
    groups = number_groups(
        (sample.image, sample.audio) if sample.image or sample.audio else sample.id for sample in samples
    )
    named = replace(
        outcomes,
        samples=hash_samples(sample.id for sample in samples),
        groups=groups if len(set(groups)) < len(groups) else None,
        **known,
    )
    result.outcomes.setdefault(task, {})[named.metric] = named
    result.scores.setdefault(task, {})[named.metric] = Score.of(named, valid=valid)


def _score_choices(result: EvaluationResult, task: str, samples: Sequence[Sample], documents: Sequence[Any]) -> None:
    """Add scores and, if choices tie, a warning."""
    judged = [Judged(tuple(values), tuple(sizes), right) for values, sizes, right in documents]
    for name in TASKS.get(task).metrics:
        _note(result, task, samples, CHOICE_METRICS.get(name)(judged))
    if ties := num_ties(judged):
        result.warnings.append(f"{task}: {ties} of {len(judged)} samples have several best choices and count as wrong")


def _score_answers(
    result: EvaluationResult,
    task: str,
    samples: Sequence[Sample],
    documents: Sequence[tuple[str, str]],
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
    texts, references = zip(*documents, strict=True)
    said = digests(map(normalise, texts))
    for name in TASKS.get(task).metrics:
        _note(result, task, samples, ANSWER_METRICS.get(name)(texts, references), answers=said, valid=valid)
    result.health[task] = dict(counts)
