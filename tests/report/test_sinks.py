"""W&B: offline runs are read back from disk, and nothing that it does ends a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from masq.errors import ConfigError
from masq.pipeline.progress import BlockClock
from masq.report.record import RunRecord
from masq.report.sinks import WandbRun, flat_numbers, plain_table, require_wandb, shown_by

WHERE = ("project", "table9")


def make_record(method: str = "rtn", identity: str = "a" * 64) -> RunRecord:
    config = {
        "model": {"name": "nano"},
        "modality": {"name": "tri"},
        "scheme": {"name": "w4a6"},
        "method": {"name": method, "rounding": {"kind": "nearest"}},
        "calibration": {"samples_per_task": 4, "samples": None, "mix": None, "chain": "quantized", "seed": 0},
    }
    record = RunRecord.start(identity, config, {})
    record.scores = {"d": {"exact_match": {"value": 0.5, "n": 4, "standard_error": None, "higher_is_better": True}}}
    record.fidelity = {"sqnr": {"text": 3.0}, "kl": {"text": 0.25}, "by_block": [1, 2]}
    record.finish()
    return record


def frames(path: Path) -> Iterator[bytes]:
    """The messages of a .wandb file: blocks of 32 KiB, a header of checksum, length and kind before every piece."""
    content, at, message = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if not kind:
            return
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""


def read_back(folder: Path, seconds: float = 20) -> dict[str, Any]:
    """What one offline run holds: settings, history, summary and artifacts; wandb's process may still be writing."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + seconds
    while not (found := _read(path))["ended"]:
        assert time.monotonic() < deadline, "the run never ended"
        time.sleep(0.1)
    return found


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"history": [], "summary": {}, "artifacts": [], "ended": False}
    for frame in frames(path):
        record = wandb_internal_pb2.Record.FromString(frame)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
        elif kind == "history":
            found["history"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
        elif kind == "artifact":
            found["artifacts"].append(record.artifact)
        elif kind == "exit":
            found["ended"] = True
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_flat_numbers_keep_paths_and_drop_what_is_no_number() -> None:
    flat = flat_numbers(make_record())
    assert flat["scores.d.exact_match.value"] == 0.5
    assert flat["fidelity.sqnr.text"] == 3.0
    assert "scores.d.exact_match.standard_error" not in flat
    assert "fidelity.by_block" not in flat


def test_a_cell_is_kept_offline_block_by_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without credentials nothing waits for a login; what came while it ran and what came out are both there."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    record = make_record()
    run = WandbRun.of_cell(*WHERE, record, tmp_path)
    with shown_by(run):
        clock = BlockClock("quantize", 2)
        clock.tick("first", {"sqnr_text": 9.5, "initial_loss": 2.0})
        clock.tick("second", {"sqnr_text": 8.5})
        clock.tick("nothing to send")
    BlockClock("quantize", 1).tick("outside", {"sqnr_text": 1.0})
    run.finish(record)
    found = read_back(tmp_path)
    assert (found["run"].project, found["run"].run_group) == ("project", "table9")
    assert found["run"].run_id == record.identity[:16]
    assert set(found["run"].tags) == {"nano", "tri", "w4a6", "rtn", "simulated"}
    shown = [{k: v for k, v in row.items() if k.startswith("quantize/")} for row in found["history"]]
    assert shown == [
        {"quantize/block": 0, "quantize/sqnr_text": 9.5, "quantize/initial_loss": 2.0},
        {"quantize/block": 1, "quantize/sqnr_text": 8.5},
    ]
    for key, value in flat_numbers(record).items():
        assert found["summary"][key] == value


def test_an_experiment_is_a_run_with_every_cell(tmp_path: Path) -> None:
    records = [make_record("rtn"), make_record("awq", "b" * 64)]
    paths = [tmp_path / f"{record.method}.json" for record in records]
    for path in paths:
        path.write_text("{}")
    run = WandbRun(*WHERE, "c" * 64, tmp_path, name="table9", job_type="experiment")
    run.finish_experiment(records, paths)
    found = read_back(tmp_path)
    assert found["run"].job_type == "experiment"
    logged = found["history"][0]
    assert logged["table/_type"] == "table-file"
    assert logged["table/nrows"] == len(records)
    assert logged["bars/kl.text_table/nrows"] == len(records)
    (stored,) = tmp_path.glob(f"wandb/offline-run-*/files/{logged['table/path']}")
    content = json.loads(stored.read_text())
    assert (content["columns"], content["data"]) == plain_table(records)
    assert [row[1] for row in content["data"]] == ["rtn", "awq"]
    names = {entry.path for artifact in found["artifacts"] for entry in artifact.manifest.contents}
    assert {"rtn.json", "awq.json"} <= names


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_failing_sink_never_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """It says so once, with what to do, and is left alone."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(*((wandb, "init", broken) if method == "init" else (wandb.Run, method, broken)))
    with caplog.at_level(logging.WARNING):
        run = WandbRun.of_cell(*WHERE, make_record(), tmp_path)
        run.log("quantize", 0, {"sqnr_text": 1.0})
        run.log("quantize", 1, {"sqnr_text": 1.0})
        run.finish(make_record())
    assert caplog.text.count("no route") == 1
    assert "wandb sync" in caplog.text
    monkeypatch.undo()
    wandb.teardown()


def test_absent_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"masq\[log\]"):
        require_wandb()
