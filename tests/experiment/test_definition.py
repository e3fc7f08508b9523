"""Experiments as files: all of them compose, and are small enough to be run."""

from __future__ import annotations

import pytest

from masq import cli
from masq.config import to_dict
from masq.errors import ConfigError
from masq.experiment.definition import cells, changed, experiment, names, scales, split
from masq.experiment.planning import render_experiment
from masq.experiment.records import cell_key
from masq.experiment.reported import tables
from masq.experiment.running import distinct
from masq.plan import plan

ALL = [(name, scale) for name in names() for scale in scales(name)]
SMOL_HOURS = 8


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_experiment_composes(name: str, scale: str) -> None:
    found = experiment(name, scale)
    there = cells(found)
    assert there
    assert len(distinct(found)) == len(there), "a cell is there twice"
    assert found.paper is None or found.paper in tables()
    embedded = {config.model.source.startswith("zoo:") for config in there}
    assert embedded == {scale == "smol"}


def test_the_paper_s_tables_are_there_at_both_scales() -> None:
    for number in range(1, 6):
        assert scales(f"table{number}") == ("full", "smol")
        assert experiment(f"table{number}").paper == f"table{number}"


def test_the_embedded_experiments_take_a_working_day() -> None:
    """Cells that several share are run once."""
    by_key = {
        cell_key(to_dict(config)): config
        for name, scale in ALL
        if scale == "smol"
        for config in distinct(experiment(name, scale))
    }
    assert sum(sum(plan(config).seconds.values()) for config in by_key.values()) <= SMOL_HOURS * 3600


def test_overrides_take_the_place_of_their_key() -> None:
    found = changed(experiment("smol_omni_widths"), ["scheme=w4a8", "threads=1"])
    assert {config.scheme.name for config in cells(found)} == {"w4a8"}
    assert {config.method.name for config in cells(found)} == {"rtn", "smoothquant"}
    assert {config.threads for config in cells(found)} == {1}


def test_an_experiment_that_shows_others_has_their_cells() -> None:
    shown = [cell_key(to_dict(config)) for config in cells(experiment("smol_omni_short"))]
    assert shown == [cell_key(to_dict(config)) for config in cells(experiment("smol_omni"))]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match=r"unknown experiment \(got: tabel1\).*table1"):
        experiment("tabel1")
    with pytest.raises(ConfigError, match=r"unknown scale of experiment smol_vl \(got: full\)"):
        experiment("smol_vl", "full")
    with pytest.raises(ConfigError, match="add experiment=NAME|Add experiment=NAME"):
        split(["scale=smol"])
    with pytest.raises(ConfigError, match="experiment is given twice"):
        split(["experiment=a", "experiment=b"])
    assert split(["experiment=a", "method=rtn", "scale=smol"]) == ("a", "smol", ["method=rtn"])


def test_plan_prints_cells_memory_disk_and_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "experiment=table1"]) == 0
    shown = capsys.readouterr().out
    assert shown == render_experiment(experiment("table1")) + "\n"
    lines = shown.splitlines()
    assert "34 cells" in lines[0]
    rows = [line for line in lines if line.startswith("| qwen2_5_vl_7b-dual-w4a6-masquant_paper ")]
    assert len(rows) == 1
    assert rows[0].count("GiB") == 2
    assert any(line.startswith("| all ") for line in lines)


def test_an_experiment_has_its_own_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-m", "experiment=table1"]) == 2
    assert "leave out -m" in capsys.readouterr().err.lower()
    assert cli.main(["sweep-status", "method=rtn"]) == 2
    assert "experiment=NAME" in capsys.readouterr().err
