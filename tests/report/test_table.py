from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from masq.errors import ConfigError, DataError
from masq.report.record import RunRecord
from masq.report.table import available_columns, footnotes, table


def make_record(method: str, value: float = 0.5, *, scheme: str = "w4a6", **config: Any) -> RunRecord:
    record = RunRecord.start(
        method,
        {
            "model": {"name": "smol_omni", "source": "zoo:smol_omni"},
            "modality": {"name": "tri"},
            "method": {"name": method, "rounding": {"kind": "none" if method == "none" else "nearest"}},
            "scheme": {"name": scheme},
            "calibration": {"samples_per_task": 32},
            "preset": "demo",
            **config,
        },
        {},
    )
    record.scores = {
        "digits": {"exact_match": {"value": value, "n": 60, "standard_error": 0.05, "higher_is_better": True}},
        "prose": {"perplexity": {"value": 10 / value, "n": 20, "standard_error": None, "higher_is_better": False}},
    }
    record.fidelity = {
        "sqnr": {"text": 10 * value, "vision": 20 * value, "first": [1.0]},
        "nll": {"vision": value},
        "sqnr_by_block": [[1.0]],
    }
    record.effective_bits = {"total": 5.0, "codes": 4.0, "adapters": 0.5}
    record.finish()
    return record


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_has_one_row_per_record_in_the_order_given() -> None:
    rows = rows_of(table([make_record("smoothquant"), make_record("rtn", 0.25)]))
    assert rows[0] == [
        "scheme",
        "method",
        "digits exact match ↑",
        "prose perplexity ↓",
        "SQNR text (dB) ↑",
        "SQNR vision (dB) ↑",
        "NLL vision ↓",
        "bits / weight",
        "adapters (% of bits)",
    ]
    assert rows[2] == ["w4a6", "smoothquant", "0.500 ± 0.050", "20.00", "5.0", "10.0", "0.500", "5.00", "10.0"]
    assert [row[1] for row in rows[2:]] == ["smoothquant", "rtn"]


def test_calibration_and_its_seed_appear_only_when_they_vary() -> None:
    drawn = {"samples_per_task": None, "samples": 128, "mix": {"text": 1.0, "audio": 2.0}, "chain": "float", "seed": 0}
    floats = make_record("none", calibration={"samples_per_task": 5, "seed": 7})
    alike = [floats, *(make_record(method, calibration=drawn) for method in ("rtn", "gptq"))]
    assert rows_of(table(alike))[0][:3] == ["scheme", "method", "digits exact match ↑"]
    assert "Calibration samples: 128 in all, tasks of text 1 : audio 2, activations of the float model." in footnotes(
        alike
    )
    seeds = [floats, *(make_record("gptq", calibration={**drawn, "seed": seed}) for seed in (0, 1))]
    rows = rows_of(table(seeds))
    assert [row[2] for row in (rows[0], *rows[2:])] == ["seed", "-", "0", "1"]
    mixes = [make_record("gptq", calibration={**drawn, "mix": mix}) for mix in (None, {"text": 1.0})]
    assert [row[2].split(",")[1].strip() for row in rows_of(table(mixes))[2:]] == [
        "every task alike",
        "tasks of text 1",
    ]
    sources = [make_record("gptq", calibration={**drawn, "source": source}) for source in ("auto", "evaluation")]
    assert [
        row[2].endswith(", of the evaluation split, activations of the float model")
        for row in rows_of(table(sources))[2:]
    ] == [False, True]


def test_model_and_modality_appear_only_when_they_vary() -> None:
    records = [make_record("rtn"), make_record("rtn", modality={"name": "dual"})]
    rows = rows_of(table(records))
    assert rows[0][:3] == ["modality", "scheme", "method"]
    assert [row[0] for row in rows[2:]] == ["tri", "dual"]


def test_the_float_row_does_not_claim_a_scheme() -> None:
    assert rows_of(table([make_record("none")]))[2][:2] == ["float", "none"]


def test_missing_scores_are_dashes() -> None:
    other = make_record("rtn")
    del other.scores["prose"]
    assert rows_of(table([make_record("mas"), other]))[3][3] == "-"


def test_nothing_is_bold_unless_asked_and_the_float_model_does_not_compete() -> None:
    records = [make_record("none", 0.9), make_record("rtn", 0.25), make_record("smoothquant", 0.5)]
    assert "**" not in table(records)
    rows = rows_of(table(records, bold=True))
    assert [row[2].startswith("**") for row in rows[2:]] == [False, False, True]
    assert [row[3].startswith("**") for row in rows[2:]] == [False, False, True]
    assert [row[6].startswith("**") for row in rows[2:]] == [False, True, False]
    assert all("*" not in row[7] for row in rows[2:])


def test_csv_keeps_precision_and_splits_standard_errors() -> None:
    value = 0.1 + 0.2
    parsed = list(csv.DictReader(io.StringIO(table([make_record("rtn", value)], format="csv"))))
    assert len(parsed) == 1
    assert float(parsed[0]["digits.exact_match"]) == value
    assert parsed[0]["digits.exact_match.standard_error"] == "0.05"
    assert "prose.perplexity.standard_error" not in parsed[0]
    assert parsed[0]["status"] == "finished"


def test_latex_escapes_what_latex_would_choke_on() -> None:
    text = table([make_record("my_method")], format="latex")
    assert r"\begin{tabular}" in text
    assert r"my\_method" in text
    assert r"adapters (\% of bits)" in text
    assert r"$\pm$" in text
    assert "±" not in text.split(r"\end{tabular}")[0]


def test_columns_by_name_and_by_prefix() -> None:
    rows = rows_of(table([make_record("rtn")], columns=["sqnr", "digits.exact_match"]))
    assert rows[0][2:] == ["SQNR text (dB) ↑", "SQNR vision (dB) ↑", "digits exact match ↑"]


def test_every_available_column_can_be_asked_for() -> None:
    records = [make_record("rtn")]
    for column in available_columns(records):
        assert len(rows_of(table(records, columns=[column.key]))[0]) == 3


def test_unknown_names_list_near_matches() -> None:
    with pytest.raises(ConfigError, match=r"digits\.exact_match"):
        table([make_record("rtn")], columns=["digits.exct_match"])
    with pytest.raises(ConfigError, match="markdown"):
        table([make_record("rtn")], format="markdwn")


def test_no_record() -> None:
    with pytest.raises(DataError, match="at least one"):
        table([])


def test_footnotes_name_float_model_counts_failures_and_warnings() -> None:
    failed = make_record("mas")
    failed.scores, failed.fidelity, failed.effective_bits = {}, {}, {}
    failed.fail(ValueError("block 3: NaN"))
    warned = make_record("rtn")
    warned.warnings = ["no calibration token of modality audio"]
    text = "\n".join(footnotes([make_record("none"), warned, failed]))
    for part in ("Q4_1", "digits 60", "32", "demo", "mas at w4a6: ValueError: block 3: NaN", "modality audio"):
        assert part in text
    assert "Q4_1" not in "\n".join(footnotes([make_record("rtn", model={"name": "m", "source": "hub/id"})]))
    rows = rows_of(table([warned, failed]))
    assert set(rows[3][2:]) == {"-"}


def test_the_footer_says_which_scores_come_from_the_final_split() -> None:
    final = make_record("rtn", evaluation={"split": "final"})
    usual = make_record("mas", evaluation={"split": "evaluation"})
    assert "final split" not in table([usual, make_record("rtn")])
    assert "- Scores come from the final split, on which nothing was chosen." in table([final, final])
    mixed = table([usual, final], format="latex")
    assert "% Scores of rtn at w4a6 come from the final split, the others do not" in mixed


def test_both_models_around_the_dequantized_one_say_so() -> None:
    for name, said in (("smol_omni", True), ("smol_vl", True), ("nano_vl", False)):
        record = make_record("rtn", model={"name": name, "source": f"zoo:{name}"})
        assert ("Q4_1" in "\n".join(footnotes([record]))) == said


def test_infinite_and_undefined_values_are_shown_and_never_best() -> None:
    broken = make_record("rtn")
    broken.scores["prose"]["perplexity"]["value"] = math.nan
    broken.fidelity["nll"]["vision"] = math.inf
    rows = rows_of(table([broken, make_record("mas")], bold=True))
    assert rows[2][3] == "nan"
    assert rows[2][6] == "inf"
    assert rows[3][3] == "**20.00**"


def test_a_score_that_is_not_valid_is_marked_and_never_best() -> None:
    broken = make_record("rtn", 0.9)
    broken.scores["digits"]["exact_match"]["valid"] = False
    text = table([broken, make_record("smoothquant", 0.5)], ["digits"], bold=True)
    rows = rows_of(text)
    assert rows[2][-1] == "0.900 ± 0.050 (!)"
    assert rows[3][-1] == "**0.500 ± 0.050**"
    assert "(!): too many answers failed" in text
    assert "(!)" not in table([make_record("rtn")])


def test_rows_with_the_same_note_share_it() -> None:
    records = [make_record(method) for method in ("rtn", "gptq", "awq")]
    records[0].warnings = records[2].warnings = ["no calibration token of modality audio", "another"]
    notes = footnotes(records)
    assert "rtn at w4a6, awq at w4a6: no calibration token of modality audio" in notes
    assert sum("another" in note for note in notes) == 1
