"""The shipped calibration and evaluation splits, and the proof that no sample is shared with training."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from . import constants as C
from . import pictures, pools, prose, speech

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("image", pa.binary()),
        ("audio", pa.binary()),
    ]
)


def content_hash(content: np.ndarray | list[int]) -> str:
    """SHA-256 of decoded pixels, samples or token ids."""
    return hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()


def png(image: np.ndarray) -> bytes:
    """Lossless picture file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def flac(wave: np.ndarray) -> bytes:
    """Lossless sound file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, C.RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _media(split: str, count: int) -> list[tuple[str, dict]]:
    """(task, sample) of the four multimodal tasks."""
    rng, fonts = pools.stream("dataset", split), pictures.font_files(split == "evaluation")
    words = speech.clip_bank(C.SPOKEN_WORDS, 8 * len(C.SPOKEN_WORDS), split, rng)
    digits = speech.clip_bank(C.DIGIT_NAMES, 16 * len(C.DIGIT_NAMES), split, rng)
    found: list[tuple[str, dict]] = []
    for _ in range(count):
        found.append(("digits", pictures.handwritten_sample(split, rng)))
    for index in range(count):
        if index % 5 < 3:
            sample = pictures.word_sample(str(rng.choice(C.PRINTED_WORDS)), fonts, rng)
        else:
            sample = pictures.number_sample(pictures.number_text(rng), fonts, rng)
        found.append(("read", sample))
    for index in range(count):
        word = int(rng.integers(len(C.SPOKEN_WORDS)))
        spoken = index % 2 == 0
        sample = (
            speech.word_sample(words, word, rng) if spoken else speech.digit_sample(digits, 1 + index // 2 % 3, rng)
        )
        found.append(("speech", sample))
    for index in range(count):
        heard, other = rng.choice(len(C.SPOKEN_WORDS), 2, replace=False)
        seen = heard if index % 2 == 0 else other
        sample = pictures.word_sample(C.SPOKEN_WORDS[seen], fonts, rng) | {"answer": "yes" if seen == heard else "no"}
        found.append(("joint", {**sample, "audio": speech.word_sample(words, int(heard), rng)["audio"]}))
    return found


def rows(split: str, count: int, tokenizer) -> tuple[list[dict], set[str]]:
    """Rows of one split in order of task, and the hashes of all their contents."""
    made, hashes, numbers = [], set(), dict.fromkeys([*C.QUESTIONS, "prose"], 0)
    for task, sample in _media(split, count):
        number = numbers[task]
        numbers[task] += 1
        # Whether the joint words agree alternates, so the question must not follow the same parity.
        question = C.QUESTIONS[task][number // 2 % len(C.QUESTIONS[task])]
        image, audio = sample.get("image"), sample.get("audio")
        hashes |= {content_hash(c) for c in (image, audio) if c is not None}
        made.append(
            {
                "id": f"{task}-{split}-{number:03d}",
                "task": task,
                "question": question,
                "answer": sample["answer"],
                "image": None if image is None else png(image),
                "audio": None if audio is None else flac(audio),
            }
        )
    for number, passage in enumerate(prose.passages(split, tokenizer)[:count]):
        hashes.add(content_hash(passage))
        text = tokenizer.decode(passage)
        made.append({"id": f"prose-{split}-{number:03d}", "task": "prose", "question": "", "answer": text})
    return made, hashes


def training_hashes(tokenizer) -> set[str]:
    """Hashes of every picture, clip and passage that training may draw."""
    hashes = {content_hash(s["image"]) for s in pools.vision_samples("train", C.VISION_POOL)}
    hashes |= {content_hash(s["audio"]) for s in pools.audio_samples("train", C.AUDIO_POOL, C.CLIPS)}
    return hashes | {content_hash(p) for p in prose.passages("train", tokenizer)}


def write(folder: Path, tokenizer) -> None:
    """Write both parquet files after checking that train, calibration and evaluation share nothing."""
    seen = training_hashes(tokenizer)
    for split, count in (("calibration", C.CALIBRATION), ("evaluation", C.EVALUATION)):
        made, hashes = rows(split, count, tokenizer)
        shared = seen & hashes
        assert not shared, f"{split} shares {len(shared)} contents with an earlier split"
        seen |= hashes
        table = pa.Table.from_pylist(made, schema=COLUMNS)
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd")
