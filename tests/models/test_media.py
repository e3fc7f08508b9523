"""Media of every container are read alike, or refused with the reason."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from masq.errors import DataError
from masq.models.media import Clip, Sound, read_clip, read_picture, read_sound

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
WAVE = np.sin(np.arange(400, dtype=np.float32) / 9) / 2


def png() -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    return buffer.getvalue()


def sound_file(kind: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, WAVE, 8000, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["picture", "bytes", "dictionary", "path", "text"])
def test_pictures(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png())
    sources: dict[str, Any] = {
        "picture": PICTURE.convert("RGBA"),
        "bytes": png(),
        "dictionary": {"bytes": png(), "path": None},
        "path": path,
        "text": str(path),
    }
    read = read_picture(sources[form], "s")
    assert (read.mode, read.tobytes()) == ("RGB", PICTURE.tobytes())


@pytest.mark.parametrize("form", ["array", "stereo", "samples first", "decoder", "FLAC", "WAV", "OGG", "path", "sound"])
def test_sounds(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    path.write_bytes(sound_file())
    decoded = SimpleNamespace(data=torch.from_numpy(np.stack([WAVE, WAVE])), sample_rate=8000)
    sources: dict[str, Any] = {
        "array": {"array": WAVE.tolist(), "sampling_rate": 8000, "path": "gone.wav"},
        "stereo": {"array": np.stack([WAVE * 0.5, WAVE * 1.5]), "sampling_rate": 8000},
        "samples first": {"array": np.stack([WAVE, WAVE], 1), "sampling_rate": 8000},
        "decoder": SimpleNamespace(get_all_samples=lambda: decoded),
        "path": str(path),
        "sound": Sound(WAVE, 8000),
    }
    read = read_sound(sources[form] if form in sources else {"bytes": sound_file(form), "path": None}, "s")
    assert (read.rate, read.waveform.dtype, read.waveform.ndim) == (8000, np.float32, 1)
    if form == "OGG":  # lossy
        assert np.corrcoef(read.waveform[: len(WAVE)], WAVE)[0, 1] > 0.99
    else:
        assert np.allclose(read.waveform, WAVE, atol=1e-4)


def test_resampling_keeps_a_tone() -> None:
    times = np.arange(8000) / 8000
    tone = Sound(np.sin(2 * np.pi * 440 * times).astype(np.float32), 8000)
    up = tone.at(16000)
    assert (up.rate, len(up.waveform), up.waveform.dtype) == (16000, 16000, np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(up.waveform - expected)[200:-200].max() < 0.01
    assert tone.at(8000) is tone
    assert len(Sound(np.zeros(44100, np.float32), 44100).at(16000).waveform) == 16000


def test_clips() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (10, 4, 6, 3), dtype=np.uint8)
    read = read_clip({"frames": frames, "fps": 5}, "s")
    assert (read.fps, read.frames.shape) == (5, (10, 4, 6, 3))
    assert np.array_equal(read_clip([Image.fromarray(frame) for frame in frames], "s").frames, frames)
    thin = read.thinned(4)
    assert np.array_equal(thin.frames, frames[[0, 2, 5, 7]])
    assert thin.fps == 2, "fewer frames for the same time"
    assert read.thinned(10) is read
    assert isinstance(read_clip(read, "s"), Clip)


@pytest.mark.parametrize(
    ("read", "source", "message"),
    [
        (read_picture, b"nothing", "complete PNG"),
        (read_picture, None, "must be bytes, a file or a decoded picture.*NoneType"),
        (read_picture, "gone.png", "must exist.*gone.png"),
        (read_picture, {"bytes": None, "path": None}, "must be bytes"),
        (read_sound, b"nothing", "complete FLAC"),
        (read_sound, {"array": [], "sampling_rate": 8000}, "decoded sound must be"),
        (read_sound, {"array": [0.1], "sampling_rate": None}, "decoded sound must be"),
        (read_sound, 3, "must be bytes.*int"),
        (read_clip, "film.mp4", "must be given as frames.*str"),
        (read_clip, np.zeros((2, 3)), r"must be given as frames.*\(2, 3\)"),
        (read_clip, [], "must be given as frames"),
    ],
)
def test_what_cannot_be_read_is_an_error(read: Any, source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(source, "s-1")
