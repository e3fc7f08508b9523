"""What generated ids say, and how many answers failed to be answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from masq.evaluation.scoring import normalise

if TYPE_CHECKING:
    from masq.models.base import ModelAdapter

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


def read_answer(
    adapter: ModelAdapter, name: str, ids: Sequence[int], *, expected: str | None = None, until: Sequence[str] = ()
) -> Answer:
    """What generated ids say.

    Args:
        adapter: the model that generated them.
        name: id of the sample.
        ids: up to and with the end token, if there is one.
        expected: an answer that may repeat itself, as the number 7777 does; None if it is not known yet.
        until: texts that end the answer and do not belong to it.
    """
    ended = bool(ids) and ids[-1] in adapter.end_ids
    text = adapter.decode(ids)
    cuts = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    loops = ends_in_loop(ids[:-1] if ended else ids)
    if cuts:
        text, ended = text[: min(cuts)], True
    correct = expected is not None and normalise(text) == normalise(expected)
    return Answer(name, text, len(ids), truncated=not ended, repeating=loops and not correct)


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
