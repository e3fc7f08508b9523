"""Answers through greedy generation, batch by batch, and how many of them failed to be answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from masq.evaluation.batch_store import BatchStore, Progress, run_batches
from masq.evaluation.scoring import normalise

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.base import ModelAdapter, Sample

# A unit of tokens this many times in a row at the end of an answer is a loop: "777" is an answer, "7777..." is not.
MIN_REPEATS = 4


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample.

    Attributes:
        id: of the sample.
        text: decoded answer.
        num_tokens: generated ids, the end token included.
        truncated: the limit of new tokens was reached before the answer ended.
        repeating: the answer ends in a loop and is not the expected one.
    """

    id: str
    text: str
    num_tokens: int
    truncated: bool
    repeating: bool

    @property
    def empty(self) -> bool:
        """Whether nothing is left of the answer when white space and final punctuation are dropped."""
        return not normalise(self.text)

    @property
    def failed(self) -> bool:
        """Whether this is no answer at all, rather than a wrong one."""
        return self.empty or self.truncated or self.repeating


def generate_answers(
    adapter: ModelAdapter,
    batches: Sequence[tuple[str, Sequence[Sample]]],
    max_new_tokens: int,
    folder: Path,
    progress: Progress,
) -> list[Answer]:
    """Have the model answer every sample.

    Args:
        adapter: the model.
        batches: file name and samples of each batch.
        max_new_tokens: longest answer.
        folder: finished batches are kept there and are not generated again.
        progress: told after every batch.

    Returns:
        Answers in the order of the samples.
    """

    def compute(samples: Sequence[Sample]) -> list[dict[str, Any]]:
        generated = adapter.generate(adapter.encode(samples, with_answer=False), max_new_tokens)
        pairs = zip(samples, generated, strict=True)
        return [asdict(_answer(adapter, sample, ids)) for sample, ids in pairs]

    store = BatchStore(folder, {"max_new_tokens": max_new_tokens})
    return [Answer(**entry) for entry in run_batches("answers", batches, compute, store, progress)]


def _answer(adapter: ModelAdapter, sample: Sample, ids: Sequence[int]) -> Answer:
    ended = bool(ids) and ids[-1] in adapter.end_ids
    text = adapter.decode(ids)
    correct = normalise(text) == normalise(sample.answer)
    loops = ends_in_loop(ids[:-1] if ended else ids)
    return Answer(sample.id, text, len(ids), truncated=not ended, repeating=loops and not correct)


def ends_in_loop(ids: Sequence[int], min_repeats: int = MIN_REPEATS) -> bool:
    """Whether ``ids`` end in one unit, of any length, ``min_repeats`` times in a row."""
    listed = list(ids)
    for period in range(1, len(listed) // min_repeats + 1):
        tail = listed[-period * min_repeats :]
        if tail == tail[:period] * min_repeats:
            return True
    return False


def health(answers: Iterable[Answer]) -> dict[str, int]:
    """Counts of failed answers by kind; an answer may be of several kinds and is ``failed`` once."""
    listed = list(answers)
    kinds = ("empty", "truncated", "repeating", "failed")
    return {"n": len(listed), **{kind: sum(getattr(answer, kind) for answer in listed) for kind in kinds}}
