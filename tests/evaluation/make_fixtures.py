"""Two records of every benchmark in its own format, of invented content: drawn pictures, tones, made-up questions.

``python -m tests.evaluation.make_fixtures`` writes ``tests/evaluation/fixtures``. Columns and types are those that the
harness' tasks read (and the neighbours that their data sets on the hub have); nothing is taken from a real benchmark.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Image, List, Value
from PIL import Image as Picture
from PIL import ImageDraw

FOLDER = Path(__file__).parent / "fixtures"
RATE = 16000
TEXT, WHOLE, TEXTS = Value("string"), Value("int64"), List(Value("string"))


def picture(text: str, colour: str) -> dict[str, Any]:
    """A small drawing of a frame and ``text``."""
    drawn = Picture.new("RGB", (48, 32), "white")
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((3, 3, 44, 28), outline=colour)
    pen.text((9, 9), text, fill="black")
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def tone(hertz: float, seconds: float, rate: int = RATE) -> dict[str, Any]:
    """A pure tone as FLAC."""
    time = np.arange(int(seconds * rate)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.3 * np.sin(2 * np.pi * hertz * time), rate, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": None}


def features(**columns: Any) -> Features:
    """The types of a data set's columns."""
    return Features(columns)


def mmmu() -> tuple[Features, list[dict[str, Any]]]:
    """One question with choices about two pictures, one open question about one; choices are a written list."""
    columns = features(
        id=TEXT,
        question=TEXT,
        options=TEXT,
        explanation=TEXT,
        **{f"image_{number}": Image() for number in range(1, 8)},
        img_type=TEXT,
        answer=TEXT,
        topic_difficulty=TEXT,
        question_type=TEXT,
        subfield=TEXT,
    )
    common = {"explanation": "", "img_type": "['Drawings']", "topic_difficulty": "Easy", "subfield": "Invention"}
    return columns, [
        common
        | {
            "id": "validation_Math_1",
            "question": "<image 1> shows a red frame. Which frame does <image 2> show?",
            "options": "['a blue one', 'a green one', 'none']",
            "image_1": picture("one", "red"),
            "image_2": picture("two", "blue"),
            "answer": "A",
            "question_type": "multiple-choice",
        },
        common
        | {
            "id": "validation_Music_2",
            "question": "Which number is written in the frame? <image 1>",
            "options": "[]",
            "image_1": picture("27", "green"),
            "answer": "27",
            "question_type": "open",
        },
    ]


def ocrbench() -> tuple[Features, list[dict[str, Any]]]:
    """A word, and a formula, whose answers are compared without spaces."""
    columns = features(dataset=TEXT, question=TEXT, question_type=TEXT, answer=TEXTS, image=Image())
    return columns, [
        {
            "dataset": "drawn",
            "question": "what is written in the image?",
            "question_type": "Regular Text Recognition",
            "answer": ["MASK", "Mask"],
            "image": picture("MASK", "red"),
        },
        {
            "dataset": "HME100k",
            "question": "Please write out the expression of the formula in the image using LaTeX format.",
            "question_type": "Handwritten Mathematical Expression Recognition",
            "answer": ["x ^ { 2 }"],
            "image": picture("x2", "blue"),
        },
    ]


def vizwiz() -> tuple[Features, list[dict[str, Any]]]:
    """Ten people's answers each, who do not agree."""
    columns = features(question_id=TEXT, image=Image(), question=TEXT, answers=TEXTS, category=TEXT)
    common = {"category": "other"}
    return columns, [
        common
        | {
            "question_id": "drawn_val_1",
            "image": picture("tea", "red"),
            "question": "What is this?",
            "answers": ["tea"] * 8 + ["a box"] * 2,
        },
        common
        | {
            "question_id": "drawn_val_2",
            "image": picture("", "gray"),
            "question": "Can you read the label?",
            "answers": ["unanswerable"] * 8 + ["no"] * 2,
        },
    ]


def scienceqa() -> tuple[Features, list[dict[str, Any]]]:
    """The right choice is a number; the second question has a hint."""
    names = ("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    columns = features(image=Image(), question=TEXT, choices=TEXTS, answer=Value("int8"), **dict.fromkeys(names, TEXT))
    common = dict.fromkeys(names, "")
    return columns, [
        common
        | {
            "image": picture("ice", "blue"),
            "question": "Which of these is cold?",
            "choices": ["the fire", "the ice"],
            "answer": 1,
        },
        common
        | {
            "image": picture("up", "red"),
            "question": "Where does the arrow point?",
            "choices": ["up", "down", "left"],
            "answer": 0,
            "hint": "An arrow has one head.",
        },
    ]


def textvqa() -> tuple[Features, list[dict[str, Any]]]:
    """Two questions about one picture."""
    columns = features(
        image_id=TEXT,
        question_id=Value("int32"),
        question=TEXT,
        question_tokens=TEXTS,
        image=Image(),
        image_width=Value("int32"),
        image_height=Value("int32"),
        flickr_original_url=TEXT,
        flickr_300k_url=TEXT,
        answers=TEXTS,
        image_classes=TEXTS,
        set_name=TEXT,
        ocr_tokens=TEXTS,
    )
    common = {
        "image_id": "drawn1",
        "image": picture("BUS 9", "green"),
        "image_width": 48,
        "image_height": 32,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_classes": ["Sign"],
        "set_name": "val",
        "ocr_tokens": ["BUS", "9"],
    }
    return columns, [
        common
        | {
            "question_id": 1,
            "question": "what number is on the sign?",
            "question_tokens": ["what", "number", "is", "on", "the", "sign"],
            "answers": ["9"] * 9 + ["bus 9"],
        },
        common
        | {
            "question_id": 2,
            "question": "what word is on the sign?",
            "question_tokens": ["what", "word", "is", "on", "the", "sign"],
            "answers": ["bus"] * 9 + ["bus 9"],
        },
    ]


def librispeech() -> tuple[Features, list[dict[str, Any]]]:
    """References in capitals, as LibriSpeech has them."""
    columns = features(id=TEXT, audio=Audio(sampling_rate=RATE), gt=TEXT, source=TEXT, task=TEXT)
    common = {"source": "librispeech_test_other", "task": "asr_en"}
    return columns, [
        common | {"id": "1-1-0000", "audio": tone(330, 0.15), "gt": "MISTER FOX DOESN'T SING"},
        common | {"id": "1-1-0001", "audio": tone(440, 0.1), "gt": "A QUIET TONE FOR TWENTY ONE DAYS"},
    ]


def wenetspeech() -> tuple[Features, list[dict[str, Any]]]:
    """One sound at another rate than the models', as a web recording may have."""
    columns = features(id=TEXT, audio=Audio(), text=TEXT)
    return columns, [
        {"id": "tone-0", "audio": tone(330, 0.15, 24000), "text": "今天有二十个声音"},
        {"id": "tone-1", "audio": tone(440, 0.1), "text": "你好世界"},
    ]


def omni_bench() -> tuple[Features, list[dict[str, Any]]]:
    """Picture and sound, and the right one of four choices in words."""
    names = ("task type", "audio type", "question", "answer", "audio content", "image content")
    columns = features(
        index=WHOLE, **dict.fromkeys(names, TEXT), options=TEXTS, image=Image(), audio=Audio(sampling_rate=RATE)
    )
    common = {
        "audio type": "sound event",
        "audio content": "a tone",
        "image content": "a frame",
        "options": ["a bell", "a bird", "a flute", "a train"],
    }
    return columns, [
        common
        | {
            "index": 0,
            "task type": "Object Identification and Description",
            "question": "What could make the tone in the frame?",
            "answer": "a flute",
            "image": picture("flute", "red"),
            "audio": tone(880, 0.15),
        },
        common
        | {
            "index": 1,
            "task type": "Action and Activity",
            "question": "What rings here?",
            "answer": "a bell",
            "image": picture("bell", "blue"),
            "audio": tone(1200, 0.1, 22050),
        },
    ]


def wikitext() -> tuple[Features, list[dict[str, Any]]]:
    """Documents with the marks that the raw text has."""
    return features(page=TEXT), [
        {"page": " = A Tone = \n \n A tone is a sound , said to have one pitch . \n"},
        {"page": " = A Frame = \n \n A well @-@ drawn frame has four sides ; some have 1 @,@ 000 . \n"},
    ]


def wikitext_rows() -> tuple[Features, list[dict[str, Any]]]:
    """Lines, empty ones included, as in the raw test split."""
    rows = ["", " = A Tone = \n", "", " A tone is a sound , said to have one pitch . \n"]
    return features(text=TEXT), [{"text": row} for row in rows]


def hellaswag() -> tuple[Features, list[dict[str, Any]]]:
    """Labels are texts."""
    names = ("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split", "split_type", "label")
    columns = features(ind=Value("int32"), **dict.fromkeys(names, TEXT), endings=TEXTS)
    common = {"source_id": "drawn~1", "split": "val", "split_type": "indomain"}
    return columns, [
        common
        | {
            "ind": 1,
            "activity_label": "Drawing",
            "ctx_a": "A girl opens a box of pens.",
            "ctx_b": "she",
            "ctx": "A girl opens a box of pens. she",
            "endings": ["draws a frame.", "swims away.", "eats the box.", "is a pen."],
            "label": "0",
        },
        common
        | {
            "ind": 2,
            "activity_label": "Playing a flute",
            "ctx_a": "A man lifts a flute to his lips.",
            "ctx_b": "the tone",
            "ctx": "A man lifts a flute to his lips. the tone",
            "endings": ["is painted [step] red.", "walks home.", "fills the room.", "is eaten."],
            "label": "2",
        },
    ]


def winogrande() -> tuple[Features, list[dict[str, Any]]]:
    """The right option is "1" or "2"."""
    columns = features(sentence=TEXT, option1=TEXT, option2=TEXT, answer=TEXT)
    return columns, [
        {
            "sentence": "The pen did not fit into the box because the _ was too long.",
            "option1": "pen",
            "option2": "box",
            "answer": "1",
        },
        {
            "sentence": "The box could not hold the pen because the _ was too short.",
            "option1": "pen",
            "option2": "box",
            "answer": "2",
        },
    ]


def arc_easy() -> tuple[Features, list[dict[str, Any]]]:
    """Labels may be letters or numbers."""
    columns = features(id=TEXT, question=TEXT, choices={"text": TEXTS, "label": TEXTS}, answerKey=TEXT)
    return columns, [
        {
            "id": "drawn-1",
            "question": "Which of these makes a tone?",
            "choices": {"text": ["a stone", "a flute", "a frame"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "id": "drawn-2",
            "question": "Which of these is flat?",
            "choices": {"text": ["a sheet", "a ball", "a bell"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
    ]


RECORDS = {
    "mmmu_val": mmmu,
    "ocrbench": ocrbench,
    "vizwiz_vqa_val": vizwiz,
    "scienceqa_img": scienceqa,
    "textvqa_val": textvqa,
    "librispeech_test_other": librispeech,
    "wenet_speech_test_net": wenetspeech,
    "omni_bench": omni_bench,
    "wikitext": wikitext,
    "wikitext_rows": wikitext_rows,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc_easy,
}
"""Types and records by file name."""


def table(columns: Features, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows with the types of their columns, which ``datasets`` reads back; a column that a row lacks is null."""
    return pa.Table.from_pylist(list(rows), schema=columns.arrow_schema)


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in RECORDS.items():
        pq.write_table(table(*make()), FOLDER / f"{name}.parquet", compression="zstd")


if __name__ == "__main__":
    main()
