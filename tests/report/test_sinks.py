from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from masq.errors import ConfigError
from masq.report.record import RunRecord
from masq.report.sinks import flat_numbers, require_wandb, send_to_wandb


def make_record() -> RunRecord:
    record = RunRecord.start("a" * 64, {"method": {"name": "rtn"}, "scheme": {"name": "w4a6"}}, {})
    record.scores = {"d": {"exact_match": {"value": 0.5, "n": 4, "standard_error": None, "higher_is_better": True}}}
    record.fidelity = {"sqnr": {"text": 3.0}, "by_block": [1, 2]}
    record.finish()
    return record


class FakeWandb(types.ModuleType):
    """Stands in for the package: records what it was given, or fails at the start."""

    class Error(Exception):
        pass

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__("wandb")
        self.broken = broken
        self.started: dict[str, Any] = {}
        self.summary: dict[str, float] = {}
        self.exit_code: int | None = None

    def init(self, **options: Any) -> FakeWandb:
        if self.broken:
            raise self.Error("no route")
        self.started = options
        return self

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_flat_numbers_keep_paths_and_drop_what_is_no_number() -> None:
    flat = flat_numbers(make_record())
    assert flat["scores.d.exact_match.value"] == 0.5
    assert flat["fidelity.sqnr.text"] == 3.0
    assert "scores.d.exact_match.standard_error" not in flat
    assert "fidelity.by_block" not in flat


@pytest.mark.usefixtures("present")
def test_offline_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert send_to_wandb(make_record(), "project", tmp_path)
    assert fake.started["mode"] == "offline"
    assert fake.started["dir"] == str(tmp_path)
    assert fake.summary["fidelity.sqnr.text"] == 3.0
    assert fake.exit_code == 0


@pytest.mark.usefixtures("present")
def test_a_failing_sink_never_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    assert send_to_wandb(make_record(), "project", tmp_path) is False


def test_absent_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"masq\[log\]"):
        require_wandb()
