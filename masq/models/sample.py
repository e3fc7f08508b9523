"""What a model is shown: a sample, the modalities in it, and hashes of its content. No torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from masq.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Modality(IntEnum):
    """What a token carries; the value is the id stored in int8 modality tensors."""

    PADDING = -1
    TEXT = 0
    VISION = 1
    AUDIO = 2


def combined_hash(parts: Mapping[str, str]) -> str:
    """One sha256 of the hashes of several named parts."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(parts.items())).encode()).hexdigest()


def labelled_hash(label: str, content: bytes) -> str:
    """sha256 of ``content`` of the kind ``label``."""
    digest = hashlib.sha256(f"{label}:{len(content)}:".encode())
    digest.update(content)
    return digest.hexdigest()


def text_hash(question: str, answer: str) -> str:
    """sha256 of a question and its answer; of a passage, the question is empty."""
    return labelled_hash(f"question {len(question.encode())}", question.encode() + answer.encode())


@dataclass(frozen=True)
class Sample:
    """One question and its answer, with encoded media; a plain passage; or a context with choices to go on.

    Attributes:
        id: unique within a data set.
        task: name of the task that scores it.
        question: text shown to the model; empty for prose; the context of choices.
        answer: the expected answer; for prose the passage itself; the right one of ``choices``.
        image: an encoded picture (PNG), or None.
        audio: an encoded waveform (FLAC or WAV), or None.
        choices: texts that may follow the context, the right one among them; empty for all other samples.

    Raises:
        DataError: choices that cannot be scored.
    """

    id: str
    task: str
    question: str
    answer: str
    image: bytes | None = None
    audio: bytes | None = None
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what scoring by likelihood needs; see the class for what it raises."""
        if not self.choices:
            return
        for holds, rule, value in self._rules_of_choices():
            if not holds:
                raise DataError(rule, value=f"sample {self.id}: {value}", remedy="correct the data")

    def _rules_of_choices(self) -> tuple[tuple[bool, str, object], ...]:
        padded = [text for text in self.choices if not text or text != text.lstrip()]
        return (
            (len(self.choices) > 1, "there must be at least two choices", len(self.choices)),
            (len(set(self.choices)) == len(self.choices), "choices must be distinct", list(self.choices)),
            (self.answer in self.choices, "the answer must be among the choices", repr(self.answer)),
            (self.image is None and self.audio is None, "a sample with choices is text alone", "it has media"),
            (bool(self.question), "choices need a context, in the column question", repr(self.question)),
            (
                self.question == self.question.rstrip(),
                "a context must not end in white space: the space before a choice belongs to the choice",
                repr(self.question[-20:]),
            ),
            (not padded, "a choice must not be empty or begin with white space", padded),
        )

    @property
    def is_prose(self) -> bool:
        """Whether the sample is a plain passage, encoded without a chat template."""
        return not self.question and self.image is None and self.audio is None

    @property
    def modalities(self) -> frozenset[Modality]:
        """Modalities of its tokens (text always)."""
        media = {Modality.VISION: self.image, Modality.AUDIO: self.audio}
        return frozenset({Modality.TEXT, *(modality for modality, data in media.items() if data is not None)})

    def content_hashes(self) -> dict[str, str]:
        """sha256 of each part shown to the model: ``image``, ``audio``, ``context`` (where there is one) and ``text``.

        The container does not matter: an image is its RGB bytes and size, a sound its float32 waveform and rate. The
        text is question and answer, and the choices in their order; the context of choices counts by itself besides.

        Raises:
            DataError: the image or the audio cannot be decoded.
        """
        from masq.models.prompts import decode_image, decode_waveform

        hashes = {}
        if self.image is not None:
            picture = decode_image(self)
            hashes["image"] = labelled_hash(f"image {picture.width}x{picture.height}", picture.tobytes())
        if self.audio is not None:
            waveform, rate = decode_waveform(self)
            hashes["audio"] = labelled_hash(f"audio {rate}", waveform.tobytes())
        question, label = self.question.encode(), ""
        choices = [choice.encode() for choice in self.choices]
        if choices:
            hashes["context"] = labelled_hash("context", question)
            label = f" choices {' '.join(str(len(choice)) for choice in choices)}"
        text = question + self.answer.encode() + b"".join(choices)
        hashes["text"] = labelled_hash(f"question {len(question)}{label}", text)
        return hashes

    def content_hash(self) -> str:
        """sha256 of all parts of ``content_hashes`` together.

        Raises:
            DataError: the image or the audio cannot be decoded.
        """
        return combined_hash(self.content_hashes())
