"""The shipped splits, and the proof that no picture, clip or passage is in two of them or in training."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from . import constants as C
from . import pictures, pools, prose, tasks

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
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


class Media:
    """Pictures and clips of one split; what two tasks can share, they share."""

    def __init__(self, split: str, count: int) -> None:
        """Draw enough for ``count`` samples of every task."""
        self.rng = pools.stream("dataset", split)
        self.split, self.fonts = split, pictures.font_files(split)
        self.speaker = pools.Speaker(split, C.SHIPPED_CLIPS, self.rng)
        self.hands = [pictures.handwritten_sample(split, self.rng) for _ in range(count)]
        self.tables = [pictures.table_sample(self.fonts, self.rng) for _ in range(count // 2)]
        self.reads = [self._read(index) for index in range(count)]
        self.sounds = [self.speaker.sample(("word", "digits")[i % 2], i // 2, self.rng) for i in range(count)]

    def _read(self, index: int) -> dict:
        kind = C.READ_KINDS[index % len(C.READ_KINDS)]
        return pools.vision_sample(kind, int(self.rng.integers(len(C.PRINTED_WORDS))), self.split, self.rng)

    def word_pair(self, index: int) -> tuple[dict, dict]:
        """A printed word and one of the clips, half of them the same."""
        words = [s for s in self.sounds if s["kind"] == "word"]
        sound = words[index % len(words)]
        text = sound["text"]
        while index % 2 and text == sound["text"]:
            text = str(self.rng.choice(C.SPOKEN_WORDS))
        return pictures.word_sample(text, self.fonts, self.rng), sound

    def number_pair(self, index: int) -> tuple[dict, dict]:
        """A printed number of two digits and one of the clips, not the same."""
        numbers = [s for s in self.sounds if s["kind"] == "digits" and len(s["text"]) == 2]
        sound = numbers[index % len(numbers)]
        text = sound["text"]
        while text == sound["text"]:
            text = pictures.number_text(self.rng, 2)
        return pictures.line_sample("number", text, self.fonts, self.rng), sound

    def pair(self, task: str, index: int) -> tuple[dict | None, dict | None]:
        """Picture and clip of one sample."""
        makers: dict[str, Callable[[], tuple[dict | None, dict | None]]] = {
            "read": lambda: (self.reads[index], None),
            "digits": lambda: (self.hands[index], None),
            "sum": lambda: (self.hands[index], None),
            "table": lambda: (self.tables[index // 2], None),
            "speech": lambda: (None, self.sounds[index]),
            "same": lambda: self.word_pair(index),
            "larger": lambda: self.number_pair(index),
            "ask": lambda: (self.hands[index], self.speaker.sample("command", index, self.rng)),
        }
        return makers[task]()


def media_rows(split: str, count: int) -> Iterator[tuple[dict, list[np.ndarray]]]:
    """Rows of the tasks with media, and what they show."""
    media = Media(split, count)
    for task in C.MEDIA_TASKS:
        asked: set[tuple[str, str]] = set()
        for index in range(count):
            picture, sound = media.pair(task, index)
            of = content_hash(picture["image"]) if picture else str(index)
            question, answer = tasks.question_answer(task, picture, sound, media.rng)
            while (of, question) in asked:
                question, answer = tasks.question_answer(task, picture, sound, media.rng)
            asked.add((of, question))
            shown = {"image": picture and picture["image"], "audio": sound and sound["audio"]}
            row = {"id": f"{task}-{split}-{index:03d}", "task": task, "question": question, "answer": answer}
            row["image"] = None if picture is None else png(shown["image"])
            row["audio"] = None if sound is None else flac(shown["audio"])
            yield row, [content for content in shown.values() if content is not None]


def text_rows(split: str, count: int, tokenizer) -> Iterator[tuple[dict, list[list[int]]]]:
    """Rows of the tasks without media, and the ids of their text."""
    rng = pools.stream("text", split)
    for kind in C.PROSE_KINDS:
        found = prose.passages(kind, split, tokenizer)
        for number, at in enumerate(sorted(rng.permutation(len(found))[:count])):
            row = {"id": f"{kind}-{split}-{number:03d}", "task": kind, "question": ""}
            yield row | {"answer": tokenizer.decode(found[at])}, [found[at]]
    for number, sample in enumerate(prose.choices(split, count, rng)):
        ids = tokenizer(sample["question"], add_special_tokens=False).input_ids
        yield {"id": f"choice-{split}-{number:03d}", "task": "choice", **sample}, [ids]


def training_hashes(tokenizer) -> set[str]:
    """Hashes of every picture, clip and passage that training may draw."""
    hashes = {content_hash(s["image"]) for s in pools.vision_samples("train", C.VISION_POOL)}
    hashes |= {content_hash(s["audio"]) for s in pools.audio_samples("train", C.AUDIO_POOL, C.CLIPS)}
    passages = (p for kind in C.PROSE_KINDS for p in prose.passages(kind, "train", tokenizer))
    return hashes | {content_hash(p) for p in passages}


def write(folder: Path, tokenizer, counts: dict[str, int], seen: set[str] | None = None) -> None:
    """Write one Parquet file per split after checking that training and the splits share nothing.

    Args:
        folder: where to.
        tokenizer: SmolLM2's.
        counts: samples per task, by split.
        seen: hashes of the training data, computed if None.
    """
    seen = training_hashes(tokenizer) if seen is None else seen
    for split, count in counts.items():
        made, hashes = [], set()
        for row, contents in (*media_rows(split, count), *text_rows(split, count, tokenizer)):
            made.append(row)
            hashes |= {content_hash(content) for content in contents}
        shared = seen & hashes
        assert not shared, f"{split} shares {len(shared)} contents with an earlier split"
        seen |= hashes
        table = pa.Table.from_pylist(made, schema=COLUMNS)
        # Pictures and clips occur in several rows: a large dictionary stores each once.
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", dictionary_pagesize_limit=64 << 20)
