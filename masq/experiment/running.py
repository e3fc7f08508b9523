"""Running an experiment: its sweeps one after the other, what failed once more, and how far it has come."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from tabulate import tabulate

from masq.config import RunConfig, to_dict
from masq.errors import MasqError
from masq.experiment.definition import Experiment, cells, cells_of_sweeps, changed, override_key
from masq.experiment.records import RecordIndex, cell_key, rows
from masq.files import is_held
from masq.identity import folder_name
from masq.plan import plan
from masq.report.record import RunRecord, read_record
from masq.report.sinks import WandbRun, experiment_id
from masq.run import LOCK
from masq.sweep import Outcome, cell_name, read_outcome

_LOG = logging.getLogger(__name__)

State = Literal["done", "running", "interrupted", "failed", "left"]
_GROUP = "output.wandb_group"
STATES: tuple[State, ...] = ("done", "running", "interrupted", "failed", "left")


def distinct(found: Experiment) -> list[RunConfig]:
    """The cells of an experiment, those that share a record once.

    Raises:
        ConfigError: a cell cannot be composed.
    """
    by_key: dict[str, RunConfig] = {}
    for config in cells(found):
        by_key.setdefault(cell_key(to_dict(config)), config)
    return list(by_key.values())


def run_experiment(found: Experiment) -> list[Outcome]:
    """Run every cell that has no record; one that fails does not stop the others and is tried once more at the end.

    Several processes may do so on one folder of results: a cell that another works on is passed over. In W&B the cells
    are a group, called as the experiment unless an override names another.

    Returns:
        How every cell ended.

    Raises:
        ConfigError: a cell cannot be composed; nothing was run.
    """
    from masq.compose import launch

    outcomes = []
    for sweep, configs in zip(changed(found, ()).sweeps, cells_of_sweeps(found), strict=True):
        named = any(override_key(override) == _GROUP for override in sweep)
        overrides = sweep if named else (*sweep, f"{_GROUP}={found.title}")
        ended = _launched(launch(overrides, configs[0].output.root), configs)
        if any(outcome.failed for outcome in ended):
            _LOG.warning("%d cells failed and are tried once more", sum(outcome.failed for outcome in ended))
            ended = _launched(launch(overrides, configs[0].output.root), configs)
        outcomes += ended
    return outcomes


def show_in_wandb(found: Experiment, index: RecordIndex) -> None:
    """One more run in W&B, for the experiment: its table, bars and records.

    Args:
        found: the experiment.
        index: the records there are.
    """
    output = cells(found)[0].output
    if not output.wandb:
        return
    group = output.wandb_group or found.title
    records = [record for record in rows(found, index) if record.status == "finished"]
    paths = [path for cell in distinct(found) if (path := index.path(cell)) is not None]
    root = Path(output.root)
    key = experiment_id(found.title, root.name)
    run = WandbRun(output.wandb_project, group, key, root, name=found.title, job_type="experiment")
    run.finish_experiment(records, paths)


def _launched(folder: Path, configs: Sequence[RunConfig]) -> list[Outcome]:
    return [read_outcome(folder, index, config) for index, config in enumerate(configs)]


@dataclass(frozen=True)
class CellStatus:
    """How far a cell has come.

    Attributes:
        cell: its name.
        state: done, running (a process holds it), interrupted (begun, nobody holds it), failed, or left.
        seconds: that it took when done, else an estimate of what is left of it.
        error: of a failed one.
    """

    cell: str
    state: State
    seconds: float
    error: str = ""


def status(found: Experiment) -> list[CellStatus]:
    """How far every cell of an experiment has come; reads nothing but the folders of its runs.

    What is left is estimated as ``masq plan`` does, times how much longer than planned the finished cells took.

    Raises:
        ConfigError: a cell cannot be composed.
    """
    wanted = distinct(found)
    folders = {root: _folders(Path(root), wanted) for root in {config.output.root for config in wanted}}
    states = [(config, *_state(folders[config.output.root].get(cell_key(to_dict(config))))) for config in wanted]
    ratios = [_seconds(record) / max(_planned(config), 1.0) for config, state, record in states if state == "done"]
    ratio = statistics.median(ratios) if ratios else 1.0
    return [
        CellStatus(
            _name(config),
            state,
            _seconds(record) if state == "done" else ratio * _planned(config),
            (record.failure or {}).get("message", "") if record is not None and state == "failed" else "",
        )
        for config, state, record in states
    ]


def render_status(statuses: Sequence[CellStatus], processes: int = 1) -> str:
    """Counts and hours by state, then failures.

    Args:
        statuses: of all cells.
        processes: that share what is left.
    """
    rows = []
    for state in STATES:
        those = [one for one in statuses if one.state == state]
        hours = f"{sum(one.seconds for one in those) / 3600:.1f}"
        rows.append([state, len(those), hours])
    left = sum(one.seconds for one in statuses if one.state != "done") / processes
    lines = [tabulate(rows, ["state", "cells", "hours"], tablefmt="github", disable_numparse=True)]
    lines.append(f"\nLeft: about {left / 3600:.1f} h with {processes} at a time")
    lines += [f"running: {one.cell}" for one in statuses if one.state == "running"]
    lines += [f"failed: {one.cell}: {one.error}" for one in statuses if one.state == "failed"]
    return "\n".join(lines)


def _folders(root: Path, configs: Sequence[RunConfig]) -> dict[str, Path]:
    """Folders of runs by cell; of two of one cell, the one that was touched last."""
    patterns = {folder_name(config, "") + "*" for config in configs}
    folders = {path for pattern in patterns for path in root.glob(pattern) if (path / "config.yaml").is_file()}
    found = {}
    for path in sorted(folders, key=lambda folder: folder.stat().st_mtime):
        found[cell_key(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))] = path
    return found


def _state(folder: Path | None) -> tuple[State, RunRecord | None]:
    if folder is None:
        return "left", None
    if is_held(folder / LOCK):
        return "running", None
    try:
        record = read_record(folder)
    except MasqError:
        return "interrupted", None
    return ("done" if record.status == "finished" else "failed"), record


def _seconds(record: RunRecord | None) -> float:
    return 0.0 if record is None else sum(record.timings.values())


def _planned(config: RunConfig) -> float:
    return sum(plan(config).seconds.values())


def _name(config: RunConfig) -> str:
    seed = config.calibration.seed
    return cell_name(config) + (f", seed {seed}" if seed and not config.method.is_float else "")
