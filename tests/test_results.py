"""Committed results: every table is what the committed records say, and the README repeats it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import tables
from experiments.misalignment.report import report
from masq.config import decode, to_dict
from masq.errors import ConfigError
from masq.files import read_json
from masq.report.record import RunRecord, read_record
from masq.run import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
TABLES = [name for name in tables.definitions()["tables"] if tables.stored(name)]


def records(name: str = "smol_omni") -> dict[str, RunRecord]:
    return tables.stored(name)


def test_the_cells_are_those_of_the_tables_finished_and_clean() -> None:
    assert {"smol_omni-tri-float-none", "smol_omni-tri-w4a6-rtn", "smol_omni-tri-w4a6-smoothquant"} <= set(records())
    for name in TABLES:
        folder = RESULTS / "records" / name
        assert not folder.exists() or {path.stem for path in folder.glob("*.json")} == set(records(name))
        for record in records(name).values():
            assert record.status == "finished"
            assert record.provenance["dirty"] is False
            assert not Path(record.config["calibration"]["source"]).is_absolute()


@pytest.mark.parametrize("name", TABLES)
def test_records_are_those_of_their_cells(name: str) -> None:
    """What a record says it did is what the table asks for today, but for options that have come since."""
    wanted = {tables.cell_name(config): tables.key(to_dict(config)) for config in tables.cells(name)}
    for cell, record in records(name).items() if wanted else ():
        assert tables.key(record.config) == wanted[cell], cell


@pytest.mark.parametrize("name", TABLES)
def test_all_cells_saw_the_same_data_and_weights(name: str) -> None:
    seen = [record.provenance["data"] for record in records(name).values()]
    assert len({data["evaluation"] for data in seen}) == len({data["model"] for data in seen}) == 1
    by_seed: dict[int, set[str]] = {}
    for record in records(name).values():
        if "calibration" in record.provenance["data"]:
            by_seed.setdefault(record.config["calibration"]["seed"], set()).add(
                record.provenance["data"]["calibration"]
            )
    assert all(len(hashes) == 1 for hashes in by_seed.values())


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_records(name: str) -> None:
    assert (RESULTS / "tables" / f"{name}.md").read_text() == tables.render(name)


def test_packed_execution_has_the_numbers_of_the_simulation() -> None:
    """Integer products are exact either way; corrections are summed in another order where linears are stacked."""
    simulated = records("smol_omni_fidelity")
    for cell, record in records("smol_omni_packed").items():
        assert set(record.provenance["kernels"]) == {"cpu"}
        for name in ("sqnr", "nll", "kl"):
            wanted = simulated[cell].fidelity[name]
            assert record.fidelity[name] == pytest.approx(wanted, rel=2e-3, abs=2e-4), (cell, name)


def test_every_table_composes_and_names_its_cells_once() -> None:
    for name in tables.definitions()["tables"]:
        names = [tables.cell_name(config) for config in tables.cells(name)]
        assert len(names) == len(set(names))
    with pytest.raises(ConfigError, match="smol_omni_seeds"):
        tables.cells("smol_omni_seed")


def test_a_cell_without_a_record_says_so() -> None:
    shown = {name: len(tables.rows(name)) for name in TABLES}
    assert all(count >= len(records(name)) for name, count in shown.items())
    for name in TABLES:
        missing = sum(record.status != "finished" for record in tables.rows(name))
        assert missing == shown[name] - len(records(name))
        assert tables.render(name).count(": not run") >= (missing > 0)


def test_the_discrimination_report_is_that_of_the_records() -> None:
    assert (RESULTS / "tables" / "discrimination.md").read_text() == report(RESULTS / "records")


def floats() -> RunRecord:
    return records()["smol_omni-tri-float-none"]


def test_ranges_were_measured_on_the_weights_of_the_records() -> None:
    measured = read_json(RESULTS / "records" / "misalignment-smol_omni.json")
    assert measured["provenance"]["dirty"] is False
    assert measured["provenance"]["data"]["model"] == floats().provenance["data"]["model"]
    assert len(measured["blocks"]) == 30


def test_the_readme_repeats_the_short_table() -> None:
    rows = [line for line in (RESULTS / "tables" / "smol_omni_short.md").read_text().splitlines() if line[:1] == "|"]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert rows
    assert [line for line in readme if line in rows] == rows


def subset_samples() -> int:
    match = re.search(r"^SUBSET_SAMPLES := (\d+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def test_the_shipped_weights_give_the_scores_of_the_record(tmp_path: Path) -> None:
    """On a fixed subset of the evaluation split, run anew."""
    record = read_record(RESULTS / "subset" / "smol_omni-tri-float-none.json")
    found = run(decode({**record.config, "output": {"root": str(tmp_path)}, "threads": None}))
    assert found.status == "finished"
    for task, metrics in record.scores.items():
        for name, entry in metrics.items():
            again = found.scores[task][name]
            assert again["n"] == entry["n"] == subset_samples()
            assert again["value"] == pytest.approx(entry["value"], rel=1e-3), (task, name)


def test_the_float_model_does_its_tasks_and_none_is_too_easy() -> None:
    scores = floats().scores
    exact = {task: metrics["exact_match"]["value"] for task, metrics in scores.items() if "exact_match" in metrics}
    # The aim for reading is 0.9 on unseen font families; it is not reached yet (see the card).
    assert exact["read"] >= 0.85
    assert scores["speech"]["wer"]["value"] <= 0.1
    assert all(exact[task] >= 0.85 for task in ("same", "larger", "ask"))
    assert sum(value == 1 for value in exact.values()) <= 1


def test_rounding_to_nearest_at_w4a6_loses_ten_points_on_two_tasks() -> None:
    start, rtn = floats().scores, records()["smol_omni-tri-w4a6-rtn"].scores
    lost = [
        task
        for task, metrics in start.items()
        if "exact_match" in metrics and metrics["exact_match"]["value"] - rtn[task]["exact_match"]["value"] >= 0.1
    ]
    assert len(lost) >= 2
