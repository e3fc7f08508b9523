"""Committed results: every table is what the committed records say, and the README repeats it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.misalignment.report import PREFIXES, report
from masq.config import decode
from masq.files import read_json
from masq.report.record import RunRecord, read_record
from masq.report.table import table
from masq.run import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
SCHEMES = ("w8a8", "w4a8", "w4a6", "w4a4")
BASELINES = ("rtn", "smoothquant")


def variable(name: str) -> list[str]:
    """A word list of the Makefile."""
    match = re.search(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return re.split(r"[ ,]", match[1])


def names() -> list[str]:
    methods = {scheme: [m for m in variable("RESULTS_METHODS") if m in BASELINES] for scheme in SCHEMES}
    methods["w4a6"] = [m for m in variable("RESULTS_METHODS") if m != "none"]
    return ["smol_omni-tri-float-none", *(f"smol_omni-tri-{s}-{m}" for s in SCHEMES for m in methods[s])]


def stored() -> dict[str, RunRecord]:
    """The committed cells by name, in the order of the table; a cell that was not run has no record."""
    files = {name: RESULTS / "records" / f"{name}.json" for name in names()}
    return {name: read_record(file) for name, file in files.items() if file.exists()}


def records() -> list[RunRecord]:
    return list(stored().values())


def dual() -> list[RunRecord]:
    return [read_record(path) for path in sorted((RESULTS / "records").glob("smol_vl-dual-*.json"))]


def test_the_cells_are_those_of_the_makefile_finished_and_clean() -> None:
    assert {path.stem for path in (RESULTS / "records").glob("smol_omni-*.json")} == set(stored())
    assert {"smol_omni-tri-float-none", "smol_omni-tri-w4a6-rtn", "smol_omni-tri-w4a6-smoothquant"} <= set(stored())
    for record in [*records(), *dual()]:
        assert record.status == "finished"
        assert record.provenance["dirty"] is False
        assert record.scores["read"]["exact_match"]["n"] == int(variable("RESULTS_SAMPLES")[0])
        assert not Path(record.config["calibration"]["source"]).is_absolute()


@pytest.mark.parametrize("cells", [records(), dual()], ids=["tri", "dual"])
def test_all_cells_saw_the_same_data_and_weights(cells: list[RunRecord]) -> None:
    seen = [record.provenance["data"] for record in cells]
    if not seen:
        pytest.skip("no such cell is committed")
    assert len({data["evaluation"] for data in seen}) == len({data["model"] for data in seen}) == 1
    assert len({data["calibration"] for data in seen if "calibration" in data}) == 1


@pytest.mark.parametrize(("name", "columns"), [("smol_omni", None), ("smol_omni_short", variable("SHORT"))])
def test_tables_are_those_of_the_records(name: str, columns: list[str] | None) -> None:
    assert (RESULTS / "tables" / f"{name}.md").read_text() == table(records(), columns).rstrip("\n") + "\n"


def test_the_discrimination_report_is_that_of_the_records() -> None:
    models = {m: p for m, p in PREFIXES.items() if (RESULTS / "records" / f"{p}-float-none.json").exists()}
    assert (RESULTS / "tables" / "discrimination.md").read_text() == report(RESULTS / "records", models)


def test_ranges_were_measured_on_the_weights_of_the_records() -> None:
    measured = read_json(RESULTS / "records" / "misalignment-smol_omni.json")
    assert measured["provenance"]["dirty"] is False
    assert measured["provenance"]["data"]["model"] == records()[0].provenance["data"]["model"]
    assert len(measured["blocks"]) == 30


def test_the_readme_repeats_the_short_table() -> None:
    rows = [line for line in (RESULTS / "tables" / "smol_omni_short.md").read_text().splitlines() if line[:1] == "|"]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert rows
    assert [line for line in readme if line in rows] == rows


def test_the_shipped_weights_give_the_scores_of_the_record(tmp_path: Path) -> None:
    """On a fixed subset of the evaluation split, run anew."""
    record = read_record(RESULTS / "subset" / "smol_omni-tri-float-none.json")
    found = run(decode({**record.config, "output": {"root": str(tmp_path)}, "threads": None}))
    assert found.status == "finished"
    for task, metrics in record.scores.items():
        for name, entry in metrics.items():
            again = found.scores[task][name]
            assert again["n"] == entry["n"] == int(variable("SUBSET_SAMPLES")[0])
            assert again["value"] == pytest.approx(entry["value"], rel=1e-3), (task, name)


def test_the_float_model_does_its_tasks_and_none_is_too_easy() -> None:
    scores = records()[0].scores
    exact = {task: metrics["exact_match"]["value"] for task, metrics in scores.items() if "exact_match" in metrics}
    # The aim for reading is 0.9 on unseen font families; it is not reached yet (see the card).
    assert exact["read"] >= 0.85
    assert scores["speech"]["wer"]["value"] <= 0.1
    assert all(exact[task] >= 0.85 for task in ("same", "larger", "ask"))
    assert sum(value == 1 for value in exact.values()) <= 1


def test_rounding_to_nearest_at_w4a6_loses_ten_points_on_two_tasks() -> None:
    start, rtn = stored()["smol_omni-tri-float-none"].scores, stored()["smol_omni-tri-w4a6-rtn"].scores
    lost = [
        task
        for task, metrics in start.items()
        if "exact_match" in metrics and metrics["exact_match"]["value"] - rtn[task]["exact_match"]["value"] >= 0.1
    ]
    assert len(lost) >= 2
