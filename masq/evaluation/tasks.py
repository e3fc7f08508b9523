"""How each task is scored. A new task is one line here; its samples name it in their column ``task``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.registry import Registry


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
