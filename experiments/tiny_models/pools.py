"""Samples of a split and their tensors: pictures and log-mel clips, each with the class of every token."""

from __future__ import annotations

import numpy as np
import torch

from . import architecture, pictures, speech
from . import constants as C

CLASSES = list(dict.fromkeys([C.NEUTRAL, *C.DIGITS, *C.PLATE_LETTERS, *C.PRINTED_WORDS, *C.COMMANDS.values()]))
CLASS_OF = {name: index for index, name in enumerate(CLASSES)}
LETTERS = ["", *"abcdefghijklmnopqrstuvwxyz0123456789", *C.PLATE_LETTERS]
LETTER_OF = {name: index for index, name in enumerate(LETTERS)}


def stream(*key: int | str) -> np.random.Generator:
    """A random stream of its own for every (purpose, split)."""
    digest = [sum(ord(c) * 31**i for i, c in enumerate(str(k))) % 2**32 for k in key]
    return np.random.default_rng([C.SEED, *digest])


def vision_sample(kind: str, index: int, split: str, rng: np.random.Generator) -> dict:
    """One picture; words come in turn."""
    fonts = pictures.font_files(split)
    if kind == "word":
        return pictures.word_sample(C.PRINTED_WORDS[index % len(C.PRINTED_WORDS)], fonts, rng)
    if kind == "number":
        # Every other number has two digits: those can be compared with spoken ones.
        return pictures.line_sample(kind, pictures.number_text(rng, 2 * (index % 2)), fonts, rng)
    if kind == "plate":
        return pictures.line_sample(kind, pictures.plate_text(rng), fonts, rng)
    if kind == "table":
        return pictures.table_sample(fonts, rng)
    return pictures.handwritten_sample(split, rng)


def vision_samples(split: str, sizes: dict[str, int]) -> list[dict]:
    """Picture samples of one split, kind after kind."""
    rng = stream("vision", split)
    return [vision_sample(kind, index, split, rng) for kind, count in sizes.items() for index in range(count)]


class Speaker:
    """The recordings of one split, and samples made of them."""

    def __init__(self, split: str, clips: dict[str, int], rng: np.random.Generator) -> None:
        """Synthesise ``clips`` recordings of each word, digit and command."""
        self.words = speech.clip_bank(C.SPOKEN_WORDS, clips["word"], split, rng)
        self.digits = speech.clip_bank(C.DIGIT_NAMES, clips["digits"], split, rng)
        self.commands = speech.clip_bank([*C.COMMANDS], clips["command"], split, rng)

    def sample(self, kind: str, index: int, rng: np.random.Generator) -> dict:
        """One clip; words, numbers of digits and commands come in turn."""
        if kind == "word":
            return self.word(C.SPOKEN_WORDS[index % len(C.SPOKEN_WORDS)], rng)
        if kind == "digits":
            # Twice as many of two digits, to be compared with printed numbers.
            return self.number("".join(rng.choice(C.DIGITS, (1, 2, 2, 3)[index % 4])), rng)
        return self.command([*C.COMMANDS][index % len(C.COMMANDS)], rng)

    def word(self, text: str, rng: np.random.Generator) -> dict:
        """A spoken word."""
        return speech.word_sample("word", text, self.words[text], rng)

    def number(self, text: str, rng: np.random.Generator) -> dict:
        """A number spoken digit by digit."""
        return speech.digit_sample(text, self.digits, rng)

    def command(self, text: str, rng: np.random.Generator) -> dict:
        """A spoken question about a picture, labelled by its one word."""
        return speech.word_sample("command", C.COMMANDS[text], self.commands[text], rng)


def audio_samples(split: str, sizes: dict[str, int], clips: dict[str, int]) -> list[dict]:
    """Spoken samples of one split, kind after kind."""
    rng = stream("audio", split)
    speaker = Speaker(split, clips, rng)
    return [speaker.sample(kind, index, rng) for kind, count in sizes.items() for index in range(count)]


def class_ids(labels: list[str]) -> list[int]:
    """Indices into ``CLASSES``."""
    return [CLASS_OF[label] for label in labels]


def vision_tensors(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack pictures [n, 56, 224], the class of each token [n, 16] and the letter of each patch [n, 64]."""
    letters = torch.tensor([[LETTER_OF[c] for c in s["letters"]] for s in samples])
    rows, columns = architecture.patch_positions()
    return {
        "input": torch.from_numpy(np.stack([s["image"] for s in samples])),
        "final": torch.tensor([class_ids(s["tokens"]) for s in samples]),
        "aux": letters[:, rows * C.SUBCOLUMNS + columns],
    }


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
    """Stack log-mel features [n, 80, 160] with the final and the local class of every token [n, 40]."""
    return {
        "input": mel_features([s["audio"] for s in samples]),
        "final": torch.tensor([class_ids(s["final"]) for s in samples]),
        "aux": torch.tensor([class_ids(s["local"]) for s in samples]),
    }
