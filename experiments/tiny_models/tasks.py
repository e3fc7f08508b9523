"""What is asked about a picture and a clip, and the right answer. A sample is one that pictures or speech made."""

from __future__ import annotations

import numpy as np

from . import constants as C


def question_answer(task: str, picture: dict | None, sound: dict | None, rng: np.random.Generator) -> tuple[str, str]:
    """One question of a task in one of its phrasings, and its answer."""
    seen = picture["text"] if picture else ""
    heard = sound["text"] if sound else ""
    if task == "digits":
        return _digits(seen, rng)
    if task == "table":
        return _table(seen.split(), rng)
    question = str(rng.choice(C.QUESTIONS[task]))
    answers = {
        "read": seen,
        "speech": heard,
        "same": f"{seen}/{heard} {'yes' if seen == heard else 'no'}",
        "larger": max(seen, heard),
    }
    if task in answers:
        return question, answers[task]
    return question, obey("sum" if task == "sum" else heard, seen)


def obey(command: str, digits: str) -> str:
    """What a spoken question asks of two digits."""
    values = [int(d) for d in digits]
    found = {"first": values[0], "last": values[-1], "sum": sum(values), "highest": max(values)}
    return str(found[command])


def _digits(seen: str, rng: np.random.Generator) -> tuple[str, str]:
    at = int(rng.choice(3, p=C.DIGITS_SHARES))
    answer = (seen, seen[0], seen[-1])[at]
    return str(rng.choice(C.QUESTIONS[("digits", "digits_first", "digits_last")[at]])), answer


def _table(cells: list[str], rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.choice(["table", "table_value", "table_letter"], p=C.TABLE_SHARES)
    cell = cells[rng.integers(len(cells))]
    question = str(rng.choice(C.QUESTIONS[kind])).format(letter=cell[0], value=cell[1:])
    return question, {"table": " ".join(cells), "table_value": cell[1:], "table_letter": cell[0]}[kind]
