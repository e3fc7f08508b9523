"""Real prose of two kinds, a technical manual and old tales, and multiple choice made of them."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np

from . import constants as C

_MARKUP = (
    (re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`]*>)?`"), r"\1"),
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]*?)(?:\s*<[^`]*>)?`_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}([^*]+)\*{1,2}"), r"\1"),
    (re.compile(r"\|(\w+)\|"), r"\1"),
)
# A paragraph of prose has this many words at least; headings, lists of names and signatures have fewer.
_MIN_WORDS = 25


def _manual_text(path: Path) -> str:
    """Paragraphs of one reStructuredText source: no code, no directives, no markup."""
    kept = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        lines = block.splitlines()
        if not lines or lines[0][:1].isspace() or lines[0].startswith(("..", ">>>", "+", "=", "*", "|", "#")):
            continue
        text = " ".join(" ".join(lines).split())
        for pattern, plain in _MARKUP:
            text = pattern.sub(plain, text)
        text = text.replace("::", ":")
        if len(text.split()) >= _MIN_WORDS and not set("`|\\{}<>") & set(text):
            kept.append(text)
    return " ".join(kept)


def _tale_text(book: str) -> str:
    """One book of the King James Bible, as the program ``bible`` prints it, without verse numbers."""
    chapters = f"{book}1:1-{book}{C.TALE_CHAPTERS[book]}:999"
    printed = subprocess.run(["bible", "-f", chapters], check=True, capture_output=True, text=True).stdout
    return " ".join(line.split(" ", 1)[1].strip() for line in printed.splitlines() if " " in line)


@lru_cache
def documents(kind: str, split: str) -> tuple[str, ...]:
    """Texts of one kind and split; no document is in two splits."""
    if kind == "tale":
        return tuple(_tale_text(book) for book in C.TALE[split])
    files = sorted(path for pattern in C.MANUAL[split] for path in Path(C.MANUAL_FOLDER).glob(pattern))
    if not files:
        raise FileNotFoundError(f"no manual under {C.MANUAL_FOLDER}: install the packages named in README.md")
    return tuple(text for text in map(_manual_text, files) if text)


def passages(kind: str, split: str, tokenizer, length: int = C.PASSAGE_TOKENS) -> list[list[int]]:
    """Token ids of passages of equal length, in document order."""
    found = []
    for text in documents(kind, split):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return found


def choices(split: str, count: int, rng: np.random.Generator) -> list[dict]:
    """Multiple choice: which of four stretches of words goes on after a beginning; both kinds of prose in turn.

    The wrong ones stand elsewhere in the same document, so that style and topic give little away.
    """
    made: list[dict] = []
    sources = [[text for text in documents(kind, split) if len(text) > C.CHOICE_MIN_TEXT] for kind in C.PROSE_KINDS]
    seen: set[str] = set()
    while len(made) < count:
        texts = sources[len(made) % len(sources)]
        words = texts[rng.integers(len(texts))].split()
        places = rng.integers(C.CHOICE_CONTEXT, len(words) - C.CHOICE_WORDS, 1 + C.CHOICE_WRONG)
        options = [" ".join(words[p : p + C.CHOICE_WORDS]) for p in places]
        context = " ".join(words[places[0] - C.CHOICE_CONTEXT : places[0]])
        if len(set(options)) < len(options) or context in seen:
            continue
        seen.add(context)
        order = rng.permutation(len(options))
        made.append({"question": context, "answer": options[0], "choices": [options[i] for i in order]})
    return made
