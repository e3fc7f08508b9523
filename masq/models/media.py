"""Pictures, sounds and clips of whatever container they come in, as the arrays that processors take.

Benchmarks hand media out as bytes, files, dictionaries of ``datasets``, decoders of ``torchcodec`` or arrays; what
cannot be read is an error with the reason, never an empty input.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masq.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Sound:
    """A mono waveform.

    Attributes:
        waveform: float32 [num_samples].
        rate: samples a second.
    """

    waveform: np.ndarray
    rate: int

    def at(self, rate: int) -> Sound:
        """The same sound at ``rate``, band-limited (polyphase filter of scipy)."""
        if rate == self.rate:
            return self
        from scipy.signal import resample_poly

        common = gcd(rate, self.rate)
        return Sound(resample_poly(self.waveform, rate // common, self.rate // common).astype("float32"), rate)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video.

    Attributes:
        frames: uint8 [F, height, width, 3].
        fps: frames a second.
    """

    frames: np.ndarray
    fps: float

    def thinned(self, num_frames: int) -> Clip:
        """At most ``num_frames`` frames, evenly spaced, the first among them; the speed is adjusted."""
        import numpy as np

        have = len(self.frames)
        if have <= num_frames:
            return self
        chosen = np.arange(num_frames) * have // num_frames
        return Clip(self.frames[chosen], self.fps * num_frames / have)


def read_picture(source: Any, name: str) -> Image.Image:
    """A picture as RGB.

    Args:
        source: a PIL image, encoded bytes, a path, or a dictionary with ``bytes`` or ``path``.
        name: of the sample, for errors.

    Raises:
        DataError: none of these, or not a picture that Pillow reads.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(_file(source, "picture", name)) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(
            "an image must be a complete PNG or another format that Pillow reads",
            value=f"sample {name}: {error}",
            remedy="write the data set again",
        ) from error


def read_sound(source: Any, name: str) -> Sound:
    """A sound, its channels averaged.

    Args:
        source: a ``Sound``, encoded bytes, a path, a dictionary with ``array`` and ``sampling_rate`` (channels first or
            last) or with ``bytes`` or ``path``, or a decoder with ``get_all_samples`` as torchcodec's.
        name: of the sample, for errors.

    Raises:
        DataError: none of these, or not a sound file that libsndfile reads (FLAC, WAV, OGG, MP3).
    """
    if isinstance(source, Sound):
        return source
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        return _mono(decoded.data, decoded.sample_rate, name)
    if isinstance(source, dict) and source.get("array") is not None:
        return _mono(source["array"], source.get("sampling_rate"), name)
    import soundfile

    try:
        waveform_nc, rate = soundfile.read(_file(source, "sound", name), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise DataError(
            "audio must be a complete FLAC, WAV or another format that libsndfile reads",
            value=f"sample {name}: {error}",
            remedy="write the data set again",
        ) from error
    return Sound(waveform_nc.mean(axis=1), int(rate))


def read_clip(source: Any, name: str) -> Clip:
    """Frames of a video.

    Args:
        source: a ``Clip``, frames uint8 [F, height, width, 3], a list of pictures, or a dictionary with ``frames`` and,
            if known, ``fps`` (1 if not).
        name: of the sample, for errors.

    Raises:
        DataError: none of these; video files are not decoded here.
    """
    import numpy as np

    if isinstance(source, Clip):
        return source
    fps = 1.0
    if isinstance(source, dict) and "frames" in source:
        source, fps = source["frames"], float(source.get("fps") or fps)
    if isinstance(source, list | tuple) and source:
        source = np.stack([np.asarray(read_picture(frame, name)) for frame in source])
    if isinstance(source, np.ndarray) and source.ndim == 4 and source.shape[3] == 3 and source.dtype == np.uint8:
        return Clip(source, fps)
    raise DataError(
        "a video must be given as frames",
        value=f"sample {name}: {_told(source)}",
        remedy="decode it first and pass uint8 frames [count, height, width, 3] or a list of pictures",
    )


def _file(source: Any, what: str, name: str) -> Any:
    """A readable file of encoded media."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise DataError(
                f"the file of a {what} must exist",
                value=f"sample {name}: {Path(source).name}",
                remedy="fetch the media of this benchmark first",
            )
        return str(source)
    raise DataError(
        f"a {what} must be bytes, a file or a decoded {what}",
        value=f"sample {name}: {_told(source)}",
        remedy="see masq.models.media for what is read",
    )


def _mono(array: Any, rate: Any, name: str) -> Sound:
    import numpy as np

    waveform = np.asarray(array, dtype=np.float32)
    if not rate or waveform.ndim not in (1, 2) or not waveform.size:
        raise DataError(
            "a decoded sound must be [samples] or [channels, samples] with its sampling rate",
            value=f"sample {name}: shape {waveform.shape}, rate {rate}",
            remedy="pass array and sampling_rate",
        )
    if waveform.ndim == 2:
        # The longer side is time: no recording has more channels than samples.
        waveform = waveform.mean(axis=int(np.argmin(waveform.shape)))
    return Sound(waveform, int(rate))


def _told(source: Any) -> str:
    shape: Sequence[int] | None = getattr(source, "shape", None)
    return type(source).__name__ + ("" if shape is None else f" {tuple(shape)}")
