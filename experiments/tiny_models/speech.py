"""Spoken words, digit sequences and short commands from espeak-ng, with the label of every audio token.

A sample has ``kind``, ``text`` (what is said; of a command, its label), ``audio`` (int16 [25600]), ``local`` (a label
where something is heard) and ``final`` (the label of every one of the 40 tokens).
"""

from __future__ import annotations

import io
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile

from . import constants as C


def _synthesise(job: tuple[str, str, int, int]) -> np.ndarray:
    text, voice, speed, pitch = job
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    wave = subprocess.run(command, check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    length = int(len(samples) * C.RATE / rate)
    clip = np.interp(np.arange(length) * rate / C.RATE, np.arange(len(samples)), samples)
    loud = np.flatnonzero(np.abs(clip) > 0.02 * np.abs(clip).max())
    clip = clip[loud[0] : loud[-1] + 1]
    return (clip / np.abs(clip).max()).astype(np.float32)


def _jobs(texts: list[str], count: int, split: str, rng: np.random.Generator) -> list[tuple]:
    """Voices, speeds and pitches: odd speeds are kept for calibration, held-out variants for the other splits."""
    variants = C.VARIANTS_HELD_OUT.get(split, C.VARIANTS)
    jobs = []
    for index in range(count):
        voice = f"{rng.choice(C.ACCENTS)}+{rng.choice(variants)}"
        speed = int(rng.integers(*C.SPEEDS)) // 2 * 2 + (split == "calibration")
        jobs.append((texts[index % len(texts)], voice, speed, int(rng.integers(*C.PITCHES))))
    return jobs


def clip_bank(texts: list[str], each: int, split: str, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Synthesise ``each`` clips of every text."""
    jobs = _jobs(texts, each * len(texts), split, rng)
    with ThreadPoolExecutor(2) as pool:
        clips = list(pool.map(_synthesise, jobs))
    return {text: clips[index :: len(texts)] for index, text in enumerate(texts)}


def _finish(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Set the level, add noise and keep 8 bits, so that lossless files stay small."""
    wave = wave * rng.uniform(0.3, 0.6) + rng.normal(0, rng.uniform(0, C.AUDIO_NOISE), C.SAMPLES)
    return (np.round(np.clip(wave, -1, 1) * 127) * 256).astype(np.int16)


def word_clip(clip: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Place one word; returns 16-bit samples and the first and last audio token with speech."""
    clip = clip[: C.SAMPLES - 800]
    start = int(rng.integers(0, C.SAMPLES - len(clip)))
    wave = np.zeros(C.SAMPLES, np.float32)
    wave[start : start + len(clip)] = clip
    last = (start + len(clip) - 1) // C.TOKEN_SAMPLES
    return _finish(wave, rng), start // C.TOKEN_SAMPLES, last


def digit_clip(clips: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Place one to three spoken digits, one per slot, each anywhere inside its slot."""
    wave = np.zeros(C.SAMPLES, np.float32)
    room = C.SLOT_TOKENS * C.TOKEN_SAMPLES
    for slot, clip in enumerate(clips):
        clip = clip[: room - 200]
        start = slot * room + int(rng.integers(0, room - len(clip)))
        wave[start : start + len(clip)] = clip
    return _finish(wave, rng)


def word_sample(kind: str, text: str, clips: list[np.ndarray], rng: np.random.Generator) -> dict:
    """One spoken word or command with token labels: ``local`` where it is heard, ``final`` everywhere."""
    wave, first, last = word_clip(clips[rng.integers(len(clips))], rng)
    local = [C.NEUTRAL] * C.AUDIO_TOKENS
    local[first : last + 1] = [text] * (last + 1 - first)
    return {"kind": kind, "text": text, "audio": wave, "local": local, "final": [text] * C.AUDIO_TOKENS}


def digit_sample(text: str, bank: dict[str, list[np.ndarray]], rng: np.random.Generator) -> dict:
    """One number spoken digit by digit: locally each slot names its digit, finally the tokens repeat the transcript."""
    clips = [bank[C.DIGIT_NAMES[int(d)]] for d in text]
    wave = digit_clip([of_digit[rng.integers(len(of_digit))] for of_digit in clips], rng)
    names = [*text] + [C.NEUTRAL] * (C.PERIOD - len(text))
    local = [names[min(t // C.SLOT_TOKENS, C.PERIOD - 1)] for t in range(C.AUDIO_TOKENS)]
    final = [names[t % C.PERIOD] for t in range(C.AUDIO_TOKENS)]
    return {"kind": "digits", "text": text, "audio": wave, "local": local, "final": final}
