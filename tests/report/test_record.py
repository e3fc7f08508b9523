from __future__ import annotations

import json
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest

from masq.errors import DataError, NumericalError, OutputError
from masq.report.record import RunRecord, ScoreEntry, comparable, read_record, write_record


def score(value: float, error: float | None = 0.1) -> ScoreEntry:
    return {"value": value, "n": 9, "standard_error": error, "higher_is_better": True}


def make_record() -> RunRecord:
    record = RunRecord.start(
        "ab12",
        {"method": {"name": "rtn"}, "scheme": {"name": "w4a6"}},
        {"commit": "c0ffee", "started": "2026-01-01T00:00:00+00:00", "finished": None, "threads": 2},
    )
    record.scores = {"digits": {"exact_match": score(0.9)}, "prose": {"perplexity": score(math.inf, None)}}
    record.fidelity = {"sqnr": {"text": 12.5, "vision": -math.inf}, "nll": {"text": math.nan}}
    record.effective_bits = {"total": 4.2}
    record.timings = {"quantize": 3.5}
    record.peak_memory_bytes = 123
    record.blocks = [{"index": 0, "sqnr": {"text": 20.0}, "seconds": 1.5}]
    record.outcomes = {"digits": {"exact_match": {"metric": "exact_match", "numerators": "110"}}}
    record.finish()
    return record


def test_round_trip_keeps_every_field_and_non_finite_numbers(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path / "record.json")
    read = read_record(tmp_path / "record.json")
    assert math.isnan(read.fidelity["nll"].pop("text"))
    record.fidelity["nll"].pop("text")
    assert read == record


def test_file_is_strict_json_with_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(make_record(), path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert set(content) == {item.name for item in fields(RunRecord)}
    assert content["schema_version"] == 1
    assert content["scores"]["prose"]["perplexity"]["value"] == "inf"
    docs = RunRecord.__doc__ or ""
    assert all(f"        {name}: " in docs for name in content), "a field lacks its documentation"


def test_reads_the_folder_of_a_run(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "record.json")
    assert read_record(tmp_path).method == "rtn"
    assert read_record(tmp_path).scheme == "w4a6"


def test_config_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    record = make_record()
    record.config["model"] = {"name": "inf"}
    write_record(record, tmp_path / "record.json")
    assert read_record(tmp_path).config["model"]["name"] == "inf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("scores"), r"unknown: scores\)$"),
        (lambda c: (c.pop("scores"), c.pop("outcomes")), r"unknown: scores\)$"),
        (lambda c: c.update(outcomes=[]), "outcomes must be dict"),
        (lambda c: c["outcomes"].update(digits="110"), r"outcomes\.digits must map metrics to outcomes"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c.update(schema_version=99), "99"),
        (lambda c: c.pop("schema_version"), "not a masq record"),
        (lambda c: c.update(status="done"), "done"),
        (lambda c: c.update(blocks={}), "blocks must be list"),
        (lambda c: c.update(peak_memory_bytes=True), "peak_memory_bytes must be int"),
        (lambda c: c["scores"]["digits"]["exact_match"].pop("n"), "missing n"),
        (lambda c: c["scores"].update(digits=3), "scores.digits"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "record.json"
    write_record(make_record(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_record(path)


def test_a_record_from_before_outcomes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(make_record(), path)
    content = json.loads(path.read_text())
    assert content.pop("outcomes") == make_record().outcomes
    path.write_text(json.dumps(content))
    assert read_record(path).outcomes == {}
    assert read_record(path).scores == make_record().scores


@pytest.mark.parametrize("keep", [0, 40, -3])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "record.json"
    write_record(make_record(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"record\.json"):
        read_record(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere"):
        read_record(tmp_path / "nowhere" / "record.json")


def test_interrupted_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_record(make_record(), path)
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    record = make_record()
    record.identity = "other"
    with pytest.raises(OutputError):
        write_record(record, path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["record.json"]


def test_comparable_ignores_clock_and_memory_only() -> None:
    one, other = make_record(), make_record()
    # NaN equals nothing, not even itself.
    one.fidelity = other.fidelity = {"sqnr": {"text": 12.5}}
    other.provenance["started"] = other.provenance["finished"] = "2027-01-01T00:00:00+00:00"
    other.timings["quantize"] = 99.0
    other.peak_memory_bytes = 7
    other.blocks[0]["seconds"] = 88.0
    assert comparable(one) == comparable(other)
    other.blocks[0]["sqnr"] = {"text": 20.000001}
    assert comparable(one) != comparable(other)
    other = make_record()
    other.fidelity = one.fidelity
    other.provenance["threads"] = 1
    assert comparable(one) != comparable(other)


def test_comparable_sees_equal_nan_as_equal() -> None:
    one, other = make_record(), make_record()
    one.fidelity["nll"]["text"], other.fidelity["nll"]["text"] = float("nan"), float("nan")
    assert comparable(one) == comparable(other)


def test_failure_keeps_measurements_and_hides_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = make_record()
    record.fail(NumericalError("the loss must be finite", value=str(tmp_path / "runs"), remedy="lower the rate"))
    write_record(record, "record.json")
    read = read_record("record.json")
    assert read.status == "failed"
    assert read.failure is not None
    assert read.failure["kind"] == "NumericalError"
    assert str(tmp_path) not in read.failure["message"]
    assert read.scores["digits"]["exact_match"]["value"] == 0.9
    read.finish()
    assert read.failure is None
