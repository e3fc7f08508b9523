"""The paper's numbers beside ours: what is read, what is compared, and every verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from masq import cli
from masq.config import to_dict
from masq.errors import ConfigError
from masq.evaluation.outcomes import Outcomes
from masq.experiment.compare_paper import compare_paper
from masq.experiment.definition import cells, experiment
from masq.experiment.records import RecordIndex
from masq.experiment.reported import names, reported, tables
from masq.report.record import RunRecord, write_record

FOUND = experiment("table1")
BENCHMARKS = {"mmmu_val": ("acc", 900), "ocrbench": ("hits", 1000), "textvqa_val": ("soft_accuracy", 500)}


def record(model: str, scheme: str, method: str, shares: dict[str, float]) -> RunRecord:
    """A finished record of a cell of table 1, its first samples right."""
    config = next(
        config
        for config in cells(FOUND)
        if (config.model.name, config.method.name) == (model, method)
        and (config.method.is_float or config.scheme.name == scheme)
    )
    found = RunRecord.start(f"{model}-{scheme}-{method}", to_dict(config), {})
    for task, share in shares.items():
        metric, n = BENCHMARKS[task]
        right = round(share * n)
        outcomes = Outcomes(
            metric=metric,
            higher_is_better=True,
            samples="0" * 64,
            numerators=(1.0,) * right + (0.0,) * (n - right),
        )
        found.outcomes[task] = {metric: outcomes.to_dict()}
        error = (share * (1 - share) / n) ** 0.5
        found.scores[task] = {metric: {"value": right / n, "n": n, "standard_error": error, "higher_is_better": True}}
    found.finish()
    return found


def verdicts(*records: RunRecord) -> dict[tuple[str, ...], list[str]]:
    index = RecordIndex((Path(f"{number}.json"), one) for number, one in enumerate(records))
    lines = compare_paper(FOUND, index).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {tuple(row[:4]): row[4:] for row in rows}


def test_the_paper_is_read_whole() -> None:
    assert {f"table{number}" for number in (1, 2, 3, 4, 5, 7)} <= set(tables())
    cells_of_1 = reported("table1")
    dense = {(c.model, c.benchmark): c.value for c in cells_of_1 if c.is_float}
    assert dense["Qwen2.5-VL-3B", "MMMU"] == 42.2
    assert dense["Qwen2.5-VL-7B", "TextVQA"] == 82.9
    with pytest.raises(ConfigError, match="table1"):
        reported("table11")


def test_most_mmmu_cells_are_whole_ninetieths() -> None:
    """What the sample size in names.yaml rests on: tables 1 and 2 print 66 of them."""
    printed = [c.value for table in ("table1", "table2") for c in reported(table) if c.benchmark == "MMMU"]
    ninetieths = {round(100 * k / 90, 1) for k in range(91)}
    assert (sum(value in ninetieths for value in printed), len(printed)) == (44, 66)


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4", "table5"])
def test_every_word_of_the_paper_has_one_of_ours(table: str) -> None:
    """But means over benchmarks, which need no record."""
    ours = {config.model.name for config in cells(experiment(table))}
    methods = {config.method.name for config in cells(experiment(table))}
    for cell in reported(table):
        assert names().models[cell.model] in ours
        assert cell.bits in names().bits
        assert cell.is_float or set(names().methods[cell.method]) & methods, cell.method
        assert cell.benchmark in names().benchmarks or cell.benchmark == "Avg", cell.benchmark


def test_without_records_nothing_was_run() -> None:
    found = verdicts()
    assert len(found) == sum(not c.is_float and c.benchmark != "Avg" for c in reported("table1"))
    assert {row[-1] for row in found.values()} == {"not run"}
    assert {row[1] for row in found.values()} == {"-"}


def test_every_verdict() -> None:
    """W4A6 of the 3B model: the paper's rounding to nearest is far below float, its W8A8 within two standard errors."""
    key = ("Qwen2.5-VL-3B", "W4A6", "SmoothQuant", "OCRBench")
    paper = {(c.model, c.bits, c.method, c.benchmark): c.value for c in reported("table1")}
    lost = (paper["Qwen2.5-VL-3B", "FP16", "Dense", "OCRBench"] - paper[key]) / 100
    assert lost > 0.05
    dense = record("qwen2_5_vl_3b", "w16a16", "none", {"ocrbench": 0.8, "mmmu_val": 0.5})
    same = record("qwen2_5_vl_3b", "w4a6", "smoothquant", {"ocrbench": 0.8 - lost})
    other = record("qwen2_5_vl_3b", "w4a6", "smoothquant", {"ocrbench": 0.8})
    w8a8 = record("qwen2_5_vl_3b", "w8a8", "rtn", {"mmmu_val": 0.2})
    found = verdicts(dense, same, w8a8)
    assert found[key][-1] == "agrees"
    assert found[key][0] == f"{paper[key]:g}"
    assert found[key][1] == f"{100 * (0.8 - lost):.1f}"
    assert found[key][2] == f"{-100 * lost:+.1f}"
    assert verdicts(dense, other)[key][-1] == "differs"
    assert verdicts(same)[key][-1] == "not run", "nothing to take a difference from"
    assert found["Qwen2.5-VL-3B", "W8A8", "RTN", "MMMU"][-1] == "float within two s.e. there"


def test_gains_of_the_embedded_model() -> None:
    found = experiment("table2", "smol")
    configs = {(c.scheme.name, c.method.name): c for c in cells(found) if not c.method.is_float}

    def made(method: str, shares: dict[str, float]) -> tuple[Path, RunRecord]:
        one = RunRecord.start(method, to_dict(configs["w4a8", method]), {})
        for task, share in shares.items():
            entry: Any = {"value": share, "n": 100, "standard_error": 0.03, "higher_is_better": task != "speech"}
            one.scores[task] = {"wer" if task == "speech" else "exact_match": entry}
        one.finish()
        return Path(method), one

    start = made("rtn", {"read": 0.5, "speech": 0.4})
    better = made("smoothquant", {"read": 0.7, "speech": 0.2})
    equal = made("mbq", {"read": 0.52, "speech": 0.41})
    worse = made("masquant", {"read": 0.2, "speech": 0.5})
    text = compare_paper(found, RecordIndex([start, better, equal, worse]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:4] == "| W4"]
    shown = {(row[0], row[1]): row[2:] for row in rows}
    # The mean of 20 points each; its error that of two independent tasks of two runs.
    assert shown["W4A8", "SmoothQuant"][1:] == ["+20.0 ± 3.0", "agrees"]
    assert shown["W4A8", "MBQ"][2] == "not distinguishable"
    assert shown["W4A8", "MASQuant"][1:] == ["-20.0 ± 3.0", "differs"]
    assert shown["W4A6", "MBQ"][2] == "not run"


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = record("qwen2_5_vl_3b", "w4a6", "smoothquant", {"ocrbench": 0.7})
    one.provenance["finished"] = "2026"
    write_record(one, tmp_path / "cell" / "record.json")
    assert cli.main(["compare-paper", "table1", "--records", str(tmp_path)]) == 0
    assert "| Qwen2.5-VL-3B | W4A6" in capsys.readouterr().out
    assert cli.main(["compare-paper", "smol_omni"]) == 2
    assert "no table of a paper" in capsys.readouterr().err
