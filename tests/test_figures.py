"""The committed figures are drawn from the committed measurements."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments import figures
from masq.files import read_json

RESULTS = Path(__file__).parent.parent / "results"


def numbers_and_words(text: str) -> tuple[list[float], list[str]]:
    """Coordinates and everything else: the last digit of a coordinate may differ from machine to machine."""
    number = re.compile(r"-?\d+\.\d+")
    return [float(one) for one in number.findall(text)], number.sub("#", text).split()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_it_is_that_of_the_measurements(name: str) -> None:
    source, draw = figures.FIGURES[name]
    committed = (RESULTS / "figures" / f"{name}.svg").read_text()
    again = draw(read_json(RESULTS / source)) + "\n"
    (found, words), (wanted, others) = numbers_and_words(again), numbers_and_words(committed)
    assert words == others
    assert found == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_it_is_a_picture_with_every_modality_and_block(name: str) -> None:
    picture = ElementTree.parse(RESULTS / "figures" / f"{name}.svg").getroot()
    texts = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert any(text and "audio" in text for text in texts)
    assert {"block", "rank ratio"} & texts


def test_a_figure_tells_other_numbers() -> None:
    record = read_json(RESULTS / figures.RESIDUAL)
    before = figures.sqnr_over_rank(record)
    record["blocks"][0]["query"]["given.audio"]["sqnr"]["plain"][0] += 50
    assert figures.sqnr_over_rank(record) != before
