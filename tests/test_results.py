"""Committed results: every table is what the committed records say, and the README repeats it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from masq.report.record import RunRecord, read_record
from masq.report.table import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
SCHEMES = ("w4a8", "w4a6")


def variable(name: str) -> list[str]:
    """A word list of the Makefile."""
    match = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return re.split(r"[ ,]", match[1])


def records() -> list[RunRecord]:
    names = ["smol_omni-tri-float-none"]
    names += [f"smol_omni-tri-{s}-{m}" for s in SCHEMES for m in variable("RESULTS_METHODS") if m != "none"]
    return [read_record(RESULTS / "records" / f"{name}.json") for name in names]


def test_every_cell_is_there_finished_and_clean() -> None:
    for record in records():
        assert record.status == "finished"
        assert record.provenance["dirty"] is False
        assert record.scores["read"]["exact_match"]["n"] == 200
        assert not Path(record.config["calibration"]["source"]).is_absolute()


def test_all_cells_saw_the_same_data_and_weights() -> None:
    seen = [record.provenance["data"] for record in records()]
    assert len({data["evaluation"] for data in seen}) == len({data["model"] for data in seen}) == 1
    assert len({data["calibration"] for data in seen if "calibration" in data}) == 1


@pytest.mark.parametrize(("name", "columns"), [("smol_omni", None), ("smol_omni_short", variable("SHORT"))])
def test_tables_are_those_of_the_records(name: str, columns: list[str] | None) -> None:
    assert (RESULTS / "tables" / f"{name}.md").read_text() == table(records(), columns).rstrip("\n") + "\n"


def test_the_readme_repeats_the_short_table() -> None:
    rows = [line for line in (RESULTS / "tables" / "smol_omni_short.md").read_text().splitlines() if line[:1] == "|"]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert rows
    assert [line for line in readme if line in rows] == rows


def test_the_float_model_does_its_tasks() -> None:
    scores = records()[0].scores
    assert all(scores[task]["exact_match"]["value"] >= 0.85 for task in ("digits", "read", "speech", "joint"))
