"""The two harnesses, unmodified, on masq's own tasks: lmms-eval where the model answers, lm-eval for likelihoods.

Both run in this process on the live model and tell what they saw of every document; scores with their errors are made
from that (``masq.evaluation.evaluate``).
"""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from masq.errors import ConfigError
from masq.evaluation.local.samples import PREFIX
from masq.evaluation.scoring import normalise
from masq.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from masq.evaluation.batch_store import Progress
    from masq.evaluation.config import EvaluationConfig
    from masq.evaluation.generation import Answer
    from masq.models.base import ModelAdapter, Sample


@dataclass
class Seen:
    """What the harnesses saw, by task.

    Attributes:
        documents: for every sample, in order, what the task's metrics are made of: answer and reference; NLL and number
            of tokens; or log-likelihoods and bytes of the choices and the right one.
        aggregates: the harness' own value of every metric.
        answers: of tasks that the model answers, with what failed.
        versions: of the harnesses.
        tasks: how each was run: its version in the harness and, where the model answers, the longest answer, what ends
            one, and which wishes of the task are not followed.
    """

    documents: dict[str, list[Any]] = field(default_factory=dict)
    aggregates: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


def require_harnesses() -> None:
    """Check that both harnesses are installed, before anything long begins.

    Raises:
        ConfigError: one of them cannot be imported.
    """
    for module, package in (("lm_eval", "lm-eval"), ("lmms_eval", "lmms-eval")):
        try:
            version(package)
            __import__(module)
        except ImportError as error:
            raise ConfigError(
                "scoring tasks needs lm-eval and lmms-eval",
                value=f"{package}: {error}",
                remedy="run `make setup`, or set evaluation.score=false to compare with the float model alone",
            ) from error


def run_tasks(
    adapter: ModelAdapter, samples: Sequence[Sample], config: EvaluationConfig, folder: Path, progress: Progress
) -> Seen:
    """Have the harnesses run every task of ``samples``; finished batches below ``folder`` are reused.

    Args:
        adapter: the model.
        samples: checked by ``masq.evaluation.tasks.check_tasks``.
        config: batch size, answer length.
        folder: of this model's run.
        progress: told after every batch.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    answered = {task: own for task, own in by_task.items() if TASKS.get(task).mode == "generate"}
    judged = {task: own for task, own in by_task.items() if task not in answered}
    seen = Seen()
    with quiet():
        if answered:
            _run_multimodal(seen, adapter, answered, config, folder, progress)
        if judged:
            _run_language(seen, adapter, judged, config, folder, progress)
    return seen


def _run_multimodal(
    seen: Seen,
    adapter: ModelAdapter,
    by_task: dict[str, list[Sample]],
    config: EvaluationConfig,
    folder: Path,
    progress: Progress,
) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from masq.evaluation.local.multimodal_task import LocalTask
    from masq.evaluation.multimodal import MasqLmms

    tasks: list[Any] = [
        LocalTask({"task": PREFIX + task}, own, config.split, config.max_new_tokens) for task, own in by_task.items()
    ]
    model = MasqLmms(
        adapter,
        folder=folder / "answers",
        batch_size=config.batch_size,
        batch_seconds=config.batch_seconds,
        progress=progress,
    )
    found = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        # One after the other: scoring in threads would change the order of random guesses.
        process_docs_parallel=1,
        log_samples=True,
    )
    _take(seen, found, by_task)
    seen.versions["lmms-eval"] = version("lmms-eval")
    for task, own in by_task.items():
        seen.tasks[task] |= model.decoding[PREFIX + task]
        seen.answers[task] = [
            replace(answer, repeating=answer.repeating and normalise(answer.text) != normalise(sample.answer))
            for sample, answer in zip(own, model.answers[PREFIX + task], strict=True)
        ]


def _run_language(
    seen: Seen,
    adapter: ModelAdapter,
    by_task: dict[str, list[Sample]],
    config: EvaluationConfig,
    folder: Path,
    progress: Progress,
) -> None:
    from lm_eval.tasks import TaskManager

    from masq.evaluation.language import MasqLm
    from masq.evaluation.local.language_task import LocalTextTask

    tasks: list[Any] = [
        LocalTextTask({"task": PREFIX + task}, own, config.split, adapter.tokenizer) for task, own in by_task.items()
    ]
    model = MasqLm(adapter, folder=folder / "likelihood", batch_size=config.batch_size, progress=progress)
    found = evaluate_language(
        model=model, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=True
    )
    _take(seen, found, by_task)
    seen.versions["lm-eval"] = version("lm-eval")


def evaluate_language(**arguments: Any) -> Any:
    """``simple_evaluate`` of lm-eval without its description of the machine, which the record has (``provenance``).

    It asks pip for every installed package: more than a second for each run, longer than a small model takes.
    """
    from lm_eval import evaluator

    describe = evaluator.add_env_info
    evaluator.add_env_info = lambda _results: None
    try:
        return evaluator.simple_evaluate(**arguments)
    finally:
        evaluator.add_env_info = describe


def _take(seen: Seen, found: Any, by_task: dict[str, list[Sample]]) -> None:
    """Documents in their order, and aggregates without the names of filters."""
    for task in by_task:
        metrics = TASKS.get(task).metrics
        logged = sorted(found["samples"][PREFIX + task], key=lambda one: one["doc_id"])
        seen.documents[task] = [one[metrics[0]] for one in logged]
        seen.tasks[task] = {"version": str(found["versions"][PREFIX + task])}
        seen.aggregates[task] = {name: found["results"][PREFIX + task][f"{name},none"] for name in metrics}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harnesses' own lines and bars: masq logs a line for every batch. Errors pass."""
    from loguru import logger

    language = logging.getLogger("lm_eval")
    level = language.level
    language.setLevel(logging.ERROR)
    logger.disable("lmms_eval")
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.enable("lmms_eval")
        language.setLevel(level)
