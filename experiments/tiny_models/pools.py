"""Training pools kept in memory: pictures with column labels, log-mel clips with token labels."""

from __future__ import annotations

import numpy as np
import torch

from . import constants as C
from . import pictures, speech

CLASSES = [C.NEUTRAL, *C.DIGITS, *C.PRINTED_WORDS]
CLASS_OF = {name: index for index, name in enumerate(CLASSES)}
LETTERS = ["", *"abcdefghijklmnopqrstuvwxyz0123456789"]
LETTER_OF = {name: index for index, name in enumerate(LETTERS)}


def stream(*key: int | str) -> np.random.Generator:
    """A random stream of its own for every (purpose, split)."""
    digest = [sum(ord(c) * 31**i for i, c in enumerate(str(k))) % 2**32 for k in key]
    return np.random.default_rng([C.SEED, *digest])


def vision_samples(split: str, sizes: dict[str, int]) -> list[dict]:
    """Picture samples of one split, each with its kind."""
    rng, fonts = stream("vision", split), pictures.font_files(split == "evaluation")
    samples = []
    for kind, count in sizes.items():
        for index in range(count):
            if kind == "words":
                sample = pictures.word_sample(C.PRINTED_WORDS[index % len(C.PRINTED_WORDS)], fonts, rng)
            elif kind == "numbers":
                sample = pictures.number_sample(pictures.number_text(rng), fonts, rng)
            else:
                sample = pictures.handwritten_sample(split, rng)
            samples.append({**sample, "kind": kind})
    return samples


def audio_samples(split: str, sizes: dict[str, int], clips: int) -> list[dict]:
    """Spoken samples of one split; ``clips`` recordings of every word and digit are synthesised."""
    rng = stream("audio", split)
    words = speech.clip_bank(C.SPOKEN_WORDS, clips * len(C.SPOKEN_WORDS), split, rng)
    digits = speech.clip_bank(C.DIGIT_NAMES, 3 * clips * len(C.DIGIT_NAMES), split, rng)
    samples = []
    for index in range(sizes["words"]):
        samples.append({**speech.word_sample(words, index % len(C.SPOKEN_WORDS), rng), "kind": "words"})
    for index in range(sizes["digits"]):
        samples.append({**speech.digit_sample(digits, 1 + index % C.SLOTS, rng), "kind": "digits"})
    return samples


def class_ids(labels: list[str]) -> list[int]:
    """Indices into ``CLASSES``."""
    return [CLASS_OF[label] for label in labels]


def vision_tensors(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack pictures, per-token classes (both token rows alike) and per-patch letters."""
    columns = torch.tensor([class_ids(s["columns"]) for s in samples])
    letters = torch.tensor([[LETTER_OF[c] for c in s["letters"]] for s in samples])
    images = torch.from_numpy(np.stack([s["image"] for s in samples]))
    return {"input": images, "final": columns.repeat(1, C.ROWS), "aux": letters}


def mel_features(waves: list[np.ndarray]) -> torch.Tensor:
    """Log-mel features [clips, 80, 160] as the processor's feature extractor computes them."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=C.MELS, chunk_length=2, sampling_rate=C.RATE)
    parts = []
    for start in range(0, len(waves), 256):
        batch = [w.astype(np.float32) / 32768.0 for w in waves[start : start + 256]]
        made = extractor(batch, sampling_rate=C.RATE, return_tensors="pt", padding="max_length")
        parts.append(made.input_features[:, :, : C.FRAMES].half())
    return torch.cat(parts)


def audio_tensors(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack log-mel features with the final and the local class of every token."""
    return {
        "input": mel_features([s["audio"] for s in samples]),
        "final": torch.tensor([class_ids(s["final"]) for s in samples]),
        "aux": torch.tensor([class_ids(s["local"]) for s in samples]),
    }
