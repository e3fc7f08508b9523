"""Passages of real prose: licence texts, which anyone may copy verbatim."""

from __future__ import annotations

from pathlib import Path

from . import constants as C


def passages(split: str, tokenizer) -> list[list[int]]:
    """Token ids of passages of equal length, in document order, from the documents of one split."""
    found = []
    for name in C.PROSE[split]:
        text = (Path(C.LICENSES) / name).read_text(encoding="utf-8")
        ids = tokenizer(" ".join(text.split()), add_special_tokens=False).input_ids
        for start in range(0, len(ids) - C.PASSAGE_TOKENS + 1, C.PASSAGE_TOKENS):
            found.append(ids[start : start + C.PASSAGE_TOKENS])
    return found
