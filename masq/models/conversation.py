"""What a model is told before it answers: turns of text, pictures, sounds and clips, in any order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from masq.errors import DataError
from masq.models.media import Clip, Sound, read_clip, read_picture, read_sound
from masq.models.sample import Modality, labelled_hash, text_hash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    Part = str | Image.Image | Sound | Clip

ROLES = ("system", "user", "assistant")
_READERS = {"image": read_picture, "audio": read_sound, "video": read_clip}


@dataclass(frozen=True, eq=False)
class Turn:
    """What one side says.

    Attributes:
        role: who speaks.
        parts: texts and decoded media, in the order in which they are read.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Conversation:
    """Turns up to the answer.

    Attributes:
        id: of the question, for errors.
        turns: at least one.
    """

    id: str
    turns: tuple[Turn, ...]

    @property
    def parts(self) -> list[Part]:
        """All parts in reading order."""
        return [part for turn in self.turns for part in turn.parts]

    @property
    def texts(self) -> list[str]:
        """All texts in reading order."""
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def modalities(self) -> frozenset[Modality]:
        """Modalities of its tokens (text always)."""
        media = {kind_of(part) for part in self.parts} - {"text"}
        return frozenset({Modality.TEXT, *(Modality.AUDIO if kind == "audio" else Modality.VISION for kind in media)})

    def content_hashes(self) -> set[str]:
        """What tells whether calibration showed it, as ``Sample.content_hashes``: of media, or else of the text."""
        hashes = {media_hash(part) for part in self.parts if not isinstance(part, str)}
        return hashes or {text_hash("", "".join(self.texts).strip())}

    @classmethod
    def from_messages(cls, name: str, messages: Sequence[Mapping[str, Any]], max_frames: int = 32) -> Conversation:
        """Messages as chat templates and lmms-eval write them.

        Args:
            name: of the question.
            messages: each with ``role`` and ``content``: a text, or parts with ``type`` text, image, audio or video and
                the content under the type's name, ``url``, or ``text``. Media are read by ``masq.models.media``.
            max_frames: of a video, evenly spaced.

        Raises:
            DataError: an unknown role or type, no messages, or media that cannot be read.
        """
        if not messages:
            raise DataError("a conversation needs at least one turn", value=f"sample {name}: none")
        return cls(name, tuple(_turn(name, message, max_frames) for message in messages))


def kind_of(part: Part) -> str:
    """``text``, ``image``, ``audio`` or ``video``, as chat templates call it."""
    if isinstance(part, str):
        return "text"
    return "audio" if isinstance(part, Sound) else "video" if isinstance(part, Clip) else "image"


def media_hash(part: Image.Image | Sound | Clip) -> str:
    """SHA-256 of decoded content: the container does not matter."""
    if isinstance(part, Sound):
        return labelled_hash(f"audio {part.rate}", part.waveform.tobytes())
    if isinstance(part, Clip):
        return labelled_hash(f"video {part.frames.shape}", part.frames.tobytes())
    return labelled_hash(f"image {part.width}x{part.height}", part.tobytes())


def _turn(name: str, message: Mapping[str, Any], max_frames: int) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(
            f"a role must be one of {', '.join(ROLES)}", value=f"sample {name}: {role!r}", remedy="correct the task"
        )
    if isinstance(content, str):
        return Turn(role, (content,))
    return Turn(role, tuple(_part(name, part, max_frames) for part in content or ()))


def _part(name: str, part: Mapping[str, Any], max_frames: int) -> Part:
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind not in _READERS:
        raise DataError(
            f"a part must be text, {', '.join(_READERS)}", value=f"sample {name}: {kind!r}", remedy="correct the task"
        )
    source = part.get(kind, part.get("url"))
    # lmms-eval calls every dictionary without a type a video; decoded sound tells what it is.
    if kind == "video" and (hasattr(source, "get_all_samples") or (isinstance(source, dict) and "array" in source)):
        kind = "audio"
    read = _READERS[kind](source, name)
    return read.thinned(max_frames) if isinstance(read, Clip) else read
