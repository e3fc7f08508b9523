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
        mode: ``generate`` has the model answer, ``likelihood`` reads the perplexity of the expected answer, ``choose``
            compares the likelihoods of all choices after their context (plain text, no chat template).
        metrics: the most important first: names of ``scoring.ANSWER_METRICS`` for answers, of
            ``scoring.CHOICE_METRICS`` for choices; ``("perplexity",)`` for likelihoods.
    """

    mode: Literal["generate", "likelihood", "choose"]
    metrics: tuple[str, ...]


TASKS: Registry[TaskKind] = Registry("task")
# Pictures: a printed word, number or plate; two handwritten digits; their sum; a cell of a printed table.
TASKS.register("read", TaskKind("generate", ("exact_match",)))
TASKS.register("digits", TaskKind("generate", ("exact_match",)))
TASKS.register("sum", TaskKind("generate", ("exact_match",)))
TASKS.register("table", TaskKind("generate", ("exact_match",)))
# Sound: spoken words and digits.
TASKS.register("speech", TaskKind("generate", ("exact_match", "wer")))
# Both: whether two words are the same; which of two numbers is larger; a spoken question about the picture.
TASKS.register("same", TaskKind("generate", ("exact_match",)))
TASKS.register("larger", TaskKind("generate", ("exact_match",)))
TASKS.register("ask", TaskKind("generate", ("exact_match",)))
# Text: passages, and contexts with several ways to go on.
TASKS.register("manual", TaskKind("likelihood", ("perplexity",)))
TASKS.register("tale", TaskKind("likelihood", ("perplexity",)))
TASKS.register("prose", TaskKind("likelihood", ("perplexity",)))
TASKS.register("choice", TaskKind("choose", ("acc_norm", "acc")))


def check_tasks(samples: Iterable[Sample]) -> None:
    """Check that every sample can be scored, before anything long begins.

    Raises:
        ConfigError: a task that no line above describes.
        DataError: a sample of a task with generated answers that has neither question nor media; a task that chooses
            and a sample without choices, or the reverse.
    """
    for sample in samples:
        mode = TASKS.get(sample.task).mode
        if (mode == "choose") != bool(sample.choices):
            raise DataError(
                "a task that chooses needs choices in every sample, and no other task has any",
                value=f"sample {sample.id} of task {sample.task} has {len(sample.choices) or 'none'}",
                remedy="fill the column choices, or name another task",
            )
        if mode == "generate" and sample.is_prose:
            raise DataError(
                "a task with generated answers needs a question, an image or a sound in every sample",
                value=f"sample {sample.id} of task {sample.task} has none",
                remedy="give it a question, or score it as a likelihood task such as manual",
            )
