"""Printed words, numbers, plates and tables, and handwritten digits, with the label of every token and patch.

A sample has ``kind``, ``text`` (what is written), ``image`` (uint8 [56, 224]), ``tokens`` (a label for each of the
2 x 8 merged tokens, row by row) and ``letters`` (a character or nothing for each of the 4 x 16 patches, row by row).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from . import constants as C


@lru_cache
def font_files(split: str) -> tuple[str, ...]:
    """Paths of the fonts of one split; calibration shares those of training."""
    found = sorted(str(p) for folder in C.FONT_FOLDERS for p in Path(folder).glob("*.[to]tf"))
    found = [f for f in found if not any(skip in f for skip in C.FONTS_SKIPPED)]
    held = {f: s for f in found for s, names in C.FONTS_HELD_OUT.items() if Path(f).name.startswith(names)}
    kept = [f for f in found if held.get(f, "train") == (split if split in C.FONTS_HELD_OUT else "train")]
    if not kept:
        raise FileNotFoundError(f"no fonts in {C.FONT_FOLDERS}: install the font packages named in README.md")
    return tuple(kept)


@lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _finish(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blend dark ink over light paper with random contrast, add noise, keep 5 bits per pixel."""
    paper, pen = rng.uniform(190, 255), rng.uniform(0, 90)
    grey = paper + (pen - paper) * ink
    grey = grey + rng.normal(0, rng.uniform(0, C.GREY_NOISE), grey.shape)
    return (np.clip(np.round(grey / 8), 0, 31) * 8).astype(np.uint8)


def _sample(kind: str, text: str, ink: np.ndarray, tokens: list, letters: list, rng: np.random.Generator) -> dict:
    return {"kind": kind, "text": text, "image": _finish(ink, rng), "tokens": tokens, "letters": letters}


def word_sample(word: str, fonts: tuple[str, ...], rng: np.random.Generator) -> dict:
    """One printed word: its token under every column it covers, its letters over every patch column."""
    path, size = fonts[rng.integers(len(fonts))], int(rng.integers(24, 44))
    while _font(path, size).getlength(word) > C.WIDTH - 8:
        size -= 2
    font = _font(path, size)
    ends = [font.getlength(word[: i + 1]) for i in range(len(word))]
    x = rng.uniform(3, C.WIDTH - 4 - ends[-1])
    y = C.HEIGHT / 2 + rng.uniform(-4, 4)
    canvas = Image.new("L", (C.WIDTH, C.HEIGHT))
    ImageDraw.Draw(canvas).text((x, y), word, fill=255, font=font, anchor="lm")
    columns = [C.NEUTRAL] * C.COLUMNS
    for column in range(C.COLUMNS):
        if min(x + ends[-1], (column + 1) * C.CELL) - max(x, column * C.CELL) > 8:
            columns[column] = word
    letters = [""] * C.SUBCOLUMNS
    for sub in range(C.SUBCOLUMNS):
        centre = (sub + 0.5) * C.PATCH - x
        if 0 <= centre < ends[-1]:
            letters[sub] = word[int(np.searchsorted(ends, centre, side="right"))]
    return _sample("word", word, np.asarray(canvas) / 255.0, columns * C.ROWS, letters * C.PATCH_ROWS, rng)


def _spread(count: int, gap: int, rng: np.random.Generator) -> list[int]:
    """Columns that hold the centres of ``count`` characters."""
    step = int(rng.integers(1, gap + 1)) if count > 1 else 1
    step = min(step, (C.COLUMNS - 1) // max(count - 1, 1))
    first = int(rng.integers(0, C.COLUMNS - step * (count - 1)))
    return [first + i * step for i in range(count)]


def _labels(text: str, places: list[int], centres: list[float], half: float) -> tuple[list[str], list[str]]:
    columns, letters = [C.NEUTRAL] * C.COLUMNS, [""] * C.SUBCOLUMNS
    for character, place, centre in zip(text, places, centres, strict=True):
        columns[place] = character
        for sub in range(C.SUBCOLUMNS):
            if abs((sub + 0.5) * C.PATCH - centre) < half:
                letters[sub] = character
    return columns, letters


def line_sample(kind: str, text: str, fonts: tuple[str, ...], rng: np.random.Generator) -> dict:
    """One printed number or plate whose characters are centred in distinct columns."""
    font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(*C.LINE_SIZES[kind])))
    places = _spread(len(text), 2, rng)
    shift = rng.uniform(-4, 4)
    centres = [(p + 0.5) * C.CELL + shift + rng.uniform(-1, 1) for p in places]
    y = C.HEIGHT / 2 + rng.uniform(-4, 4)
    canvas = Image.new("L", (C.WIDTH, C.HEIGHT))
    for character, centre in zip(text, centres, strict=True):
        ImageDraw.Draw(canvas).text((centre, y), character, fill=255, font=font, anchor="mm")
    columns, letters = _labels(text, places, centres, 11)
    return _sample(kind, text, np.asarray(canvas) / 255.0, columns * C.ROWS, letters * C.PATCH_ROWS, rng)


def table_sample(fonts: tuple[str, ...], rng: np.random.Generator) -> dict:
    """Two rows of two cells; a cell is a letter and a value of two digits, as in ``A37``, one character per column."""
    font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(*C.TABLE_SIZES)))
    keys = rng.choice(list(C.PLATE_LETTERS), 4, replace=False)
    cells = [f"{key}{value}" for key, value in zip(keys, rng.choice(np.arange(10, 100), 4, replace=False), strict=True)]
    canvas, tokens, letters = Image.new("L", (C.WIDTH, C.HEIGHT)), [], []
    draw, shift = ImageDraw.Draw(canvas), rng.uniform(-3, 3)
    for row in range(C.ROWS):
        y = (row + 0.5) * C.CELL + rng.uniform(-2, 2)
        first = int(rng.integers(0, 2))
        places = [first + p for p in (0, 1, 2, 4, 5, 6)]
        text = cells[2 * row] + cells[2 * row + 1]
        centres = [(p + 0.5) * C.CELL + shift + rng.uniform(-1, 1) for p in places]
        for character, centre in zip(text, centres, strict=True):
            draw.text((centre, y), character, fill=255, font=font, anchor="mm")
        line, marks = _labels(text, places, centres, 9)
        tokens += line
        letters += marks * C.MERGE
    return _sample("table", " ".join(cells), np.asarray(canvas) / 255.0, tokens, letters, rng)


@lru_cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of one split: scans of scikit-learn's data set, never shared by two splits."""
    scans, targets = load_digits(return_X_y=True)
    order = np.random.default_rng(C.SEED).permutation(len(targets))
    edges = np.cumsum([0, *C.SCANS.values()])
    at = list(C.SCANS).index(split)
    part = order[edges[at] : edges[at + 1]]
    return scans[part].reshape(-1, 8, 8) / 16.0, targets[part]


def handwritten_sample(split: str, rng: np.random.Generator) -> dict:
    """A two-digit number of two handwritten scans, each centred in a column of its own."""
    scans, targets = handwriting(split)
    picks = rng.integers(0, len(targets), 2)
    places = _spread(2, 4, rng)
    while places[1] - places[0] < 2:
        places = _spread(2, 4, rng)
    centres = [min(max((p + 0.5) * C.CELL + rng.uniform(-6, 6), 22), C.WIDTH - 22) for p in places]
    ink = np.zeros((C.HEIGHT, C.WIDTH))
    for pick, centre in zip(picks, centres, strict=True):
        size = int(rng.integers(34, 45))
        scan = Image.fromarray((scans[pick] * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        if split == "train":
            # There are few scans: each is seen leaning and slanted in many ways.
            slant = rng.uniform(-C.SLANT, C.SLANT)
            shape = (1, slant, -slant * size / 2, rng.uniform(-C.SLANT, C.SLANT) / 2, 1, 0)
            scan = scan.rotate(rng.uniform(-C.LEAN, C.LEAN), Image.Resampling.BICUBIC)
            scan = scan.transform(scan.size, Image.Transform.AFFINE, shape, Image.Resampling.BICUBIC)
        left = int(np.clip(centre - size / 2, 0, C.WIDTH - size))
        top = int(np.clip((C.HEIGHT - size) / 2 + rng.uniform(-5, 5), 0, C.HEIGHT - size))
        region = ink[top : top + size, left : left + size]
        np.maximum(region, np.asarray(scan) / 255.0, out=region)
    text = "".join(str(targets[p]) for p in picks)
    columns, letters = _labels(text, places, centres, 14)
    return _sample("hand", text, ink, columns * C.ROWS, letters * C.PATCH_ROWS, rng)


def number_text(rng: np.random.Generator, count: int = 0) -> str:
    """A number of ``count`` digits, of two to four if it is 0."""
    count = count or int(rng.integers(2, 5))
    return str(rng.integers(10 ** (count - 1), 10**count))


def plate_text(rng: np.random.Generator) -> str:
    """Three to six letters and digits in turn, beginning with a letter, so that every character is a token."""
    count = int(rng.integers(3, 7))
    return "".join(str(rng.integers(10)) if i % 2 else str(rng.choice(list(C.PLATE_LETTERS))) for i in range(count))
