"""lmms-eval through its public interface: a live masq model as an ``lmms``, every medium of a request kept.

The harness' own adapters drop media that they do not know, send sound off as video and turn an exception into an empty
answer, which looks like low accuracy. Here a medium that cannot be read or that the model does not take is an error
that ends the evaluation; finished batches stay on disk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, cast

from lmms_eval.api.model import lmms

from masq.errors import ConfigError
from masq.evaluation.batch_store import BatchStore, Progress, ProgressLog, run_batches
from masq.evaluation.generation import Answer, read_answer
from masq.models.conversation import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lmms_eval.api.instance import Instance

    from masq.models.base import ModelAdapter

# What a task may ask of generation without changing a greedy answer.
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 0, "top_p": None, "top_k": None, "use_cache": True}
DEFAULT_NEW_TOKENS = 1024
"""Longest answer of a task that names no limit."""


@dataclass(frozen=True, eq=False)
class Question:
    """One request of the harness.

    Attributes:
        id: of task, split and document, with a hash of the text: what an answer on disk must fit.
        task: name of the task.
        messages: makes the turns up to the answer, media undecoded; called only if the answer is not on disk.
        max_new_tokens: longest answer.
        until: texts that end an answer and do not belong to it.
    """

    id: str
    task: str
    messages: Callable[[], Sequence[Mapping[str, Any]]]
    max_new_tokens: int
    until: tuple[str, ...]


class MasqLmms(lmms):
    """A model adapter as lmms-eval sees it (``simple_evaluate(model=MasqLmms(adapter), ...)``).

    Answers are greedy whatever a task asks for; ``decoding`` says, for the record, what was asked and is not done.

    Attributes:
        answers: what was answered, by task, in the order of the requests.
        decoding: by task: ``max_new_tokens``, ``until``, ``ignored`` generation arguments, and where a batch ran out of
            time, how many answers that ``cut_by_time``.
    """

    is_simple = False

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        folder: Path | str | None = None,
        batch_size: int = 1,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        max_frames: int = 32,
        batch_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Wrap a live model.

        Args:
            adapter: the model; with quantized linears, the modality hook is already installed.
            folder: finished batches are kept there and reused; of this model alone. A temporary one by default.
            batch_size: requests per batch; batches are a fixed function of the order of requests.
            max_new_tokens: longest answer of tasks that name no limit.
            max_frames: of a video, evenly spaced.
            batch_seconds: a batch that takes longer is cut there (see ``EvaluationConfig``).
            progress: told after every batch; logs a line by default.
        """
        super().__init__()
        if batch_size < 1:
            raise ConfigError("batch_size must be positive", value=batch_size)
        self.adapter = adapter
        self.folder = Path(mkdtemp(prefix="masq-answers-") if folder is None else folder)
        self.batch_size, self.max_new_tokens, self.max_frames = batch_size, max_new_tokens, max_frames
        self.batch_seconds = batch_seconds
        self.progress = progress or ProgressLog()
        self.answers: dict[str, list[Answer]] = {}
        self.decoding: dict[str, dict[str, Any]] = {}

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.adapter.device

    def clean(self) -> None:
        """Keep the model: the harness empties its own after the last request, this one goes on."""

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to all requests, batch by batch and task by task.

        Raises:
            DataError: a medium that cannot be read.
            ModelError: a medium that the model does not take.
        """
        questions = [self._question(request) for request in requests]
        store = BatchStore(self.folder, {"batch_size": self.batch_size, "max_frames": self.max_frames})
        batches = [(name, group) for name, group in _batches(questions, self.batch_size)]
        entries = run_batches("answers", batches, self._compute, store, self.progress)
        by_id = {entry["id"]: Answer(**entry) for entry in entries}
        for question in questions:
            answer = by_id[question.id]
            self.answers.setdefault(question.task, []).append(answer)
            if answer.truncated and answer.num_tokens < question.max_new_tokens:
                decoding = self.decoding[question.task]
                decoding["cut_by_time"] = decoding.get("cut_by_time", 0) + 1
        return [by_id[question.id].text for question in questions]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not of this adapter: tasks scored by likelihood go through lm-eval (``masq.evaluation.language``)."""
        raise NotImplementedError(
            "tasks scored by likelihood run through lm-eval with masq.evaluation.language; "
            f"{requests[0].task_name if requests else 'none'} asks lmms-eval for it"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported: no task of several rounds is part of a masq suite."""
        raise NotImplementedError(f"{len(requests)} requests of several rounds: choose tasks that are answered at once")

    def _compute(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        conversations = [Conversation.from_messages(one.id, one.messages(), self.max_frames) for one in questions]
        batch = self.adapter.encode_conversations(conversations)
        limit = max(one.max_new_tokens for one in questions)
        generated = self.adapter.generate(batch, limit, self.batch_seconds)
        return [
            asdict(read_answer(self.adapter, one.id, ids, until=one.until))
            for one, ids in zip(questions, generated, strict=True)
        ]

    def _question(self, request: Instance) -> Question:
        context, doc_to_messages, asked, doc_id, task, split = cast("tuple[Any, ...]", request.args)
        known = {"max_new_tokens", "until", *_GREEDY}
        ignored = {
            name: value
            for name, value in asked.items()
            if name not in known or (name in _GREEDY and value not in (None, _GREEDY[name]))
        }
        limit = int(asked.get("max_new_tokens") or self.max_new_tokens)
        until = asked.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        self.decoding[task] = {"max_new_tokens": limit, "until": list(until), "ignored": ignored}
        told = json.dumps([context, limit, until])
        return Question(
            id=f"{task}/{split}/{doc_id}/{hashlib.sha256(told.encode()).hexdigest()[:16]}",
            task=task,
            messages=lambda: doc_to_messages(self.task_dict[task][split][doc_id]),
            max_new_tokens=limit,
            until=until,
        )


def _batches(questions: Sequence[Question], size: int) -> Iterable[tuple[str, list[Question]]]:
    """Questions of one task and one limit together, in their order; names count within a task."""
    groups: dict[tuple[str, int], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.task, question.max_new_tokens), []).append(question)
    for (task, limit), group in groups.items():
        for number, start in enumerate(range(0, len(group), size)):
            yield f"{task}-{limit}-{number:04d}", group[start : start + size]
