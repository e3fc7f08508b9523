"""How each task is scored. A new task is one line here; its samples name it in their column ``task``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from masq.errors import DataError
from masq.registry import Registry

if TYPE_CHECKING:
    from masq.models.base import Sample


@dataclass(frozen=True, slots=True)
class TaskKind:
    """One way of scoring.

    Attributes:
        mode: ``generate`` has the model answer, ``likelihood`` reads the perplexity of the expected answer.
        metrics: names of ``scoring.ANSWER_METRICS`` for answers, the most important first; ``("perplexity",)`` for
            likelihoods.
    """

    mode: Literal["generate", "likelihood"]
    metrics: tuple[str, ...]


TASKS: Registry[TaskKind] = Registry("task")
TASKS.register("digits", TaskKind("generate", ("exact_match",)))
TASKS.register("read", TaskKind("generate", ("exact_match",)))
TASKS.register("speech", TaskKind("generate", ("exact_match", "wer")))
TASKS.register("joint", TaskKind("generate", ("exact_match",)))
TASKS.register("prose", TaskKind("likelihood", ("perplexity",)))


def check_tasks(samples: Iterable[Sample]) -> None:
    """Check that every sample can be scored, before anything long begins.

    Raises:
        ConfigError: a task that no line above describes.
        DataError: a sample of a task with generated answers that has neither question nor media.
    """
    for sample in samples:
        if TASKS.get(sample.task).mode == "generate" and sample.is_prose:
            raise DataError(
                "a task with generated answers needs a question, an image or a sound in every sample",
                value=f"sample {sample.id} of task {sample.task} has none",
                remedy="give it a question, or score it as a likelihood task such as prose",
            )
