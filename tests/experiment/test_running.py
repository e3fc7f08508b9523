"""Experiments run on a tiny random model: skipping, failing, several processes, kills, W&B."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from masq.errors import BusyError, NumericalError
from masq.experiment import running
from masq.experiment.definition import Experiment, cells, changed, experiment
from masq.experiment.records import RecordIndex, missing, render
from masq.experiment.running import render_status, run_experiment, show_in_wandb, status
from masq.files import exclusive, is_held
from masq.report.record import comparable, read_record
from masq.run import LOCK, run
from tests.report.test_sinks import read_back
from tests.test_run import write_split

QUICK = ("model=nano_omni", "threads=1", "evaluation.samples_per_task=2", "evaluation.fidelity_samples_per_task=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    splits = {name: write_split(folder / f"{name}.parquet", name, 3, seed) for name, seed in DATA_SEEDS.items()}
    return [f"{name}.source={path}" for name, path in splits.items()]


DATA_SEEDS = {"calibration": 100, "evaluation": 200}


def quick(name: str, data: list[str], root: Path, *more: str) -> Experiment:
    overrides = [*QUICK, *data, "calibration.samples_per_task=2", f"output.root={root}"]
    return changed(experiment(name), [*overrides, *more])


def test_cells_are_run_once_and_the_table_is_theirs(data: list[str], tmp_path: Path) -> None:
    found = quick("smol_omni_packed", data, tmp_path, "method=rtn,smoothquant")
    assert [one.state for one in status(found)] == ["left", "left"]
    outcomes = run_experiment(found)
    assert [outcome.error for outcome in outcomes] == [None, None]
    index = RecordIndex.of_folders(tmp_path)
    assert missing(found, index) == 0
    assert {line.split("|")[2].strip() for line in render(found, index).splitlines()[2:4]} == {"rtn", "smoothquant"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")}
    assert all(outcome.record for outcome in run_experiment(found))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")} == before
    assert [one.state for one in status(found)] == ["done", "done"]
    assert "| done        | 2" in render_status(status(found))


def test_what_fails_is_tried_again_and_listed(data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from masq import run as run_module

    calls = []

    def fails(*arguments: object) -> None:
        calls.append(arguments)
        raise NumericalError("a block diverged")

    monkeypatch.setattr(run_module, "_fill", fails)
    found = quick("smol_omni_packed", data, tmp_path, "method=rtn")
    (outcome,) = run_experiment(found)
    assert outcome.failed
    assert len(calls) == 2
    (one,) = status(found)
    assert (one.state, one.error) == ("failed", "a block diverged")
    assert "failed: nano_omni-tri-w4a8-rtn: a block diverged" in render_status([one])
    monkeypatch.undo()
    assert [outcome.failed for outcome in run_experiment(found)] == [False]


def test_a_cell_of_another_process_is_passed_over(data: list[str], tmp_path: Path) -> None:
    found = quick("smol_omni_packed", data, tmp_path, "method=rtn,smoothquant")
    (first, _) = cells(found)
    record = run(first)
    (folder,) = tmp_path.glob("nano_omni-*")
    (folder / "record.json").unlink()
    assert status(found)[0].state == "interrupted"
    with exclusive(folder / LOCK):
        assert is_held(folder / LOCK)
        assert status(found)[0].state == "running"
        with pytest.raises(BusyError, match="another process"):
            run(first)
        assert [(outcome.busy, outcome.failed) for outcome in run_experiment(found)] == [(True, False), (False, False)]
    assert not is_held(folder / LOCK)
    assert comparable(run(first)) == comparable(record)


def test_cells_are_a_group_in_wandb_and_the_experiment_a_run(data: list[str], tmp_path: Path) -> None:
    found = quick("smol_omni_packed", data, tmp_path, "method=rtn,smoothquant", "output.wandb=true")
    assert not any(outcome.failed for outcome in run_experiment(found))
    show_in_wandb(found, RecordIndex.of_folders(tmp_path))
    for folder in tmp_path.glob("nano_omni-*"):
        cell, record = read_back(folder), read_record(folder)
        assert cell["run"].run_group == "smol_omni_packed"
        assert [row["quantize/block"] for row in cell["history"]] == [block["index"] for block in record.blocks]
        assert cell["history"][0]["quantize/sqnr_text"] == pytest.approx(record.blocks[0]["sqnr"]["text"])
        assert cell["summary"]["fidelity.kl.text"] == record.fidelity["kl"]["text"]
    whole = read_back(tmp_path)
    assert whole["history"][0]["table/nrows"] == 2
    assert (whole["run"].run_group, whole["run"].display_name) == ("smol_omni_packed", "smol_omni_packed")


def command(data: list[str], root: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "masq", "run", *more, *QUICK, *data),
        *("calibration.samples_per_task=2", f"output.root={root}"),
    ]


def comparable_records(root: Path) -> dict[str, str]:
    return {
        path.parent.name: json.dumps(comparable(read_record(path)), sort_keys=True)
        for path in sorted(root.glob("*/record.json"))
    }


def kill_at_random(arguments: list[str], times: int, seconds: tuple[float, float], seed: int) -> None:
    """Start, kill with its children, start again; let the last one end."""
    generator = random.Random(seed)
    for _ in range(times):
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(generator.uniform(*seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(arguments, check=True, capture_output=True)


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_with_the_records_of_an_undisturbed_one(data: list[str], tmp_path: Path) -> None:
    """Forty cells, five kills; a cell that had finished is not touched again."""
    sweep = ["experiment=smol_omni_packed", "method=rtn,smoothquant,gptq,quarot_gptq,masquant", "seed=0,1,2,3"]
    sweep += ["scheme=w4a8,w8a8", "evaluation=fidelity"]
    undisturbed, killed = tmp_path / "undisturbed" / "runs", tmp_path / "killed" / "runs"
    subprocess.run(command(data, undisturbed, *sweep), check=True, capture_output=True)
    kill_at_random(command(data, killed, *sweep), 5, (6, 20), seed=0)
    wanted = comparable_records(undisturbed)
    assert len(wanted) == 40
    assert comparable_records(killed) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "plugin"), [("local", "joblib"), ("cluster", "ray")])
def test_launchers_survive_a_killed_worker(data: list[str], tmp_path: Path, launcher: str, plugin: str) -> None:
    """One worker of a local cluster is killed while it works; the same command then finishes the rest."""
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    sweep = ["experiment=smol_omni_packed", "method=rtn,smoothquant,masquant", "seed=0,1", f"hydra/launcher={launcher}"]
    arguments = command(data, tmp_path, *sweep)
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lock = wait_for_lock(tmp_path)
    os.kill(holder(lock), signal.SIGKILL)
    process.communicate(timeout=300)
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    assert len(comparable_records(tmp_path)) == 6


def wait_for_lock(root: Path) -> Path:
    """The lock of a cell that a process works on."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in root.glob(f"*/{LOCK}"):
            if is_held(path):
                return path
        time.sleep(0.05)
    raise AssertionError("no cell was begun")


def holder(lock: Path) -> int:
    """The process that has a lock file open."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(entry.resolve() == lock.resolve() for entry in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nobody holds {lock}")


def test_what_is_left_is_estimated_from_what_was_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = changed(experiment("smol_omni_packed"), [f"output.root={tmp_path}"])
    before = [one.seconds for one in status(found)]
    assert all(seconds > 0 for seconds in before)
    monkeypatch.setattr(running, "_state", lambda folder: ("left", None))
    assert [one.seconds for one in status(found)] == before
    assert f"Left: about {sum(before) / 3600 / 2:.1f} h with 2 at a time" in render_status(status(found), processes=2)
