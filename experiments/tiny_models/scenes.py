"""Scenes of one split: which picture and which clip go together, and what is asked about them."""

from __future__ import annotations

import numpy as np

from . import constants as C
from . import pools, tasks


class Scenes:
    """Pools of one split and draws from them.

    Attributes:
        vision: tensors of the pictures.
        audio: tensors of the clips.
    """

    def __init__(self, split: str, pictures: dict[str, int], sounds: dict[str, int], clips: dict[str, int]) -> None:
        """Make the pools; sizes by kind."""
        self.pictures = pools.vision_samples(split, pictures)
        self.sounds = pools.audio_samples(split, sounds, clips)
        self.vision, self.audio = pools.vision_tensors(self.pictures), pools.audio_tensors(self.sounds)
        self.seen, self.heard = _by_kind(self.pictures), _by_kind(self.sounds)
        spoken = set(C.SPOKEN_WORDS)
        self.words = [i for i in self.seen["word"] if self.pictures[i]["text"] in spoken]
        self.by_word: dict[str, list[int]] = {}
        for index in self.words:
            self.by_word.setdefault(self.pictures[index]["text"], []).append(index)
        self.printed = [i for i in self.seen["number"] if len(self.pictures[i]["text"]) == 2]
        self.spoken = [i for i in self.heard["digits"] if len(self.sounds[i]["text"]) == 2]

    def draw(self, scene: str, count: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Rows of pictures and rows of clips."""
        if scene == "words":
            sounds = rng.choice([i for i in self.heard["word"] if self.sounds[i]["text"] in self.by_word], count)
            rows = [self.by_word[self.sounds[s]["text"]] if i % 2 else self.words for i, s in enumerate(sounds)]
            return [int(rng.choice(r)) for r in rows], sounds.tolist()
        if scene == "numbers":
            return _different(self, rng.choice(self.printed, count), count, rng)
        if scene == "speech":
            return [], self._mixed(self.heard, ("word", "digits"), count, rng)
        kinds = {"read": ("word", "number", "plate"), "table": ("table",)}.get(scene, ("hand",))
        sounds = rng.choice(self.heard["command"], count).tolist() if scene == "ask" else []
        return self._mixed(self.seen, kinds, count, rng), sounds

    @staticmethod
    def _mixed(groups: dict[str, list[int]], kinds: tuple[str, ...], count: int, rng: np.random.Generator) -> list[int]:
        return [int(rng.choice(groups[kinds[i % len(kinds)]])) for i in range(count)]

    def questions(
        self, scene: str, pictures: list[int], sounds: list[int], rng: np.random.Generator
    ) -> list[list[tuple[str, str]]]:
        """For every task of the scene, question and answer of each sample."""
        count = max(len(pictures), len(sounds))
        pairs = [
            (self.pictures[pictures[i]] if pictures else None, self.sounds[sounds[i]] if sounds else None)
            for i in range(count)
        ]
        return [[tasks.question_answer(task, *pair, rng) for pair in pairs] for task in C.SCENES[scene]["tasks"]]


def _different(
    scenes: Scenes, printed: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    sounds = []
    for row in printed:
        sound = rng.choice(scenes.spoken)
        while scenes.sounds[sound]["text"] == scenes.pictures[row]["text"]:
            sound = rng.choice(scenes.spoken)
        sounds.append(int(sound))
    return printed.tolist(), sounds


def _by_kind(samples: list[dict]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        found.setdefault(sample["kind"], []).append(index)
    return found
