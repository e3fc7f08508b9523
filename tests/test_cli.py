from __future__ import annotations

import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from masq import cli, compose
from masq.config import RunConfig, decode, to_dict
from masq.errors import NumericalError
from masq.identity import identity, run_folder
from masq.report.record import RunRecord, write_record

ROOT = Path(__file__).parents[1]
FAST_SECONDS = 2.0


def run_masq(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the command line in a process of its own; also its CPU time, which other work on the machine leaves alone."""
    code = "import sys; from masq.cli import main; rc = main(); print('torch' in sys.modules); sys.exit(rc)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_at_once(tmp_path: Path) -> None:
    result, seconds = run_masq("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("run", "table", "plan", "doctor"))
    assert seconds < FAST_SECONDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "method=masqant"], "unknown method (got: masqant). Did you mean masquant"),
        (["run", "-m", "scheme=w4a8,w4a9"], "unknown scheme (got: w4a9). Did you mean w4a8"),
        (["plan", "model=nano_vl"], "nano_vl has no audio"),
    ],
)
def test_a_configuration_error_answers_at_once_without_torch(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result, seconds = run_masq(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("masq: error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == "False\n", "torch was imported"
    assert seconds < FAST_SECONDS
    assert list(tmp_path.iterdir()) == [], "an error leaves nothing behind"


def test_plan_needs_no_torch_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result, seconds = run_masq("plan", "method=rtn", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Peak memory" in result.stdout
    assert result.stdout.endswith("False\n")
    assert seconds < FAST_SECONDS
    assert list(tmp_path.iterdir()) == []


def test_the_module_is_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "masq", "rnu"]
    result = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "masq: error: unknown command (got: rnu). Did you mean run?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "metod=rtn"], "unknown configuration key (got: metod). Did you mean method"),
        (["run", "method.smoothing.alhpa=1"], "Did you mean method.smoothing.alpha?"),
        (["run", "+method.smoothing.alhpa=1"], "Did you mean method.smoothing.alpha?"),
        (["run", "method.smoothing.alpha=high"], "method.smoothing.alpha must be a finite number"),
        (
            ["run", "rotation=hadamard"],
            "rotation is a slot of the method (got: rotation=hadamard). Write method.rotation=",
        ),
        (["run", "method=null"], "cannot be composed"),
        (["run", "method.smoothing=sharde"], "unknown smoothing (got: sharde). Did you mean shared"),
        (["run", "modality=trio"], "unknown modality (got: trio). Did you mean tri?"),
        (["run", "preset=demmo"], "unknown preset (got: demmo). Did you mean demo?"),
        (["run", "scheme=w4a8,w4a6"], "one run takes one value for each key (got: scheme=w4a8,w4a6). Add -m"),
        (["run", "-m", "scheme=w4a8,w16a16"], "in scheme=w16a16: scheme w16a16 leaves nothing for method masquant"),
        (["run", "-m", "seed=0,x", "method=rtn"], "in seed=x method=rtn: seed must be a whole number"),
        (["run", "masquant"], "an override must be KEY=VALUE (got: masquant)"),
        (["run", "model.source=a(b"], "an override cannot be read (got: model.source=a(b)"),
        (["run", "model.source=${nothing}"], "the configuration cannot be composed"),
        (["run", "~method"], "must be given"),
        (["run", "--config", "nowhere.yaml"], "cannot read nowhere.yaml (got: No such file or directory)"),
        (["run", "-m", "--config", "nowhere.yaml"], "--config runs one cell"),
        (["table", "nowhere"], "no record.json there (got: nowhere)"),
        (["plan", "model=qwen2_5_vl_3b", "modality=dual", "model.source=/nowhere/at/all"], "an existing folder"),
    ],
)
def test_what_the_user_can_correct_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_changed_method_carries_the_change_in_its_name(runner: list[RunConfig]) -> None:
    changed = ["run", "method=masquant", "method.compensation.rank_ratio=0.02", "method.rounding=gptq"]
    assert cli.main(changed) == 0
    assert cli.main([*changed, "method.name=mine"]) == 0
    assert cli.main(["run", "method=masquant", "method.description=x"]) == 0
    names = [config.method.name for config in runner]
    assert names == ["masquant+compensation.rank_ratio=0.02+rounding=gptq", "mine", "masquant"]


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([])
    assert raised.value.code == 2
    assert "masq COMMAND --help" in capsys.readouterr().out


def test_an_unwritable_folder_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["run", f"output.root={tmp_path / 'file'}"]) == 2
    assert "must be writable" in capsys.readouterr().err
    assert cli.main(["run", "-m", "method=rtn,mas", f"output.root={tmp_path / 'file'}"]) == 2
    assert runner == []


@pytest.mark.parametrize(
    ("override", "passed_on"),
    [
        ("method=rtn", "method=rtn"),
        ("method=rtn,mas", "method=rtn,mas"),
        ("seed=3", "++seed=3"),
        ("+seed=3", "++seed=3"),
        ("method.smoothing.alpha=0.4", "++method.smoothing.alpha=0.4"),
        ("method.smoothing=modality", "smoothing@method.smoothing=modality"),
        ("method.smoothing={kind: none}", "++method.smoothing={kind: none}"),
        ("smoothing@method.smoothing=modality", "smoothing@method.smoothing=modality"),
        ("hydra/launcher=basic", "hydra/launcher=basic"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("~preset", "~preset"),
        ("model.source='a=b'", "++model.source='a=b'"),
    ],
)
def test_overrides_are_passed_on_so_that_defaults_can_be_changed(override: str, passed_on: str) -> None:
    assert compose._for_hydra([override]) == [passed_on]


def make_record(config: RunConfig) -> RunRecord:
    record = RunRecord.start(identity(config, {}), to_dict(config), {})
    record.status = "finished"
    record.fidelity = {"sqnr": {"text": 10.0}}
    return record


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Replace ``masq.run`` by one that fails on w4a4 in our words, on w8a8 as a defect would, and else succeeds."""
    seen: list[RunConfig] = []

    def run(config: RunConfig) -> RunRecord:
        seen.append(config)
        if config.scheme.name == "w4a4":
            raise NumericalError("the loss must be finite", value="nan")
        if config.scheme.name == "w8a8":
            raise ZeroDivisionError("division by zero")
        record = make_record(config)
        write_record(record, run_folder(config, record.identity) / "record.json")
        return record

    module = types.ModuleType("masq.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "masq.run", module)
    return seen


def test_one_run_prints_its_table_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig]
) -> None:
    assert cli.main(["run", "method=rtn", "preset=demo", "threads=1", f"output.root={tmp_path}"]) == 0
    assert (runner[0].method.name, runner[0].preset, runner[0].threads) == ("rtn", "demo", 1)
    out = capsys.readouterr().out
    assert "rtn" in out
    assert f"Record: {run_folder(runner[0], identity(runner[0], {}))}/record.json" in out


def test_a_run_that_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig]) -> None:
    assert cli.main(["run", "scheme=w4a4", f"output.root={tmp_path}"]) == 2
    assert capsys.readouterr().err.endswith("masq: error: the loss must be finite (got: nan)\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "scheme=w8a8", f"output.root={tmp_path}"])


def test_a_resolved_file_runs_without_hydra(
    tmp_path: Path, runner: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["run", "method=rtn", f"output.root={tmp_path}"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(runner[0])))
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert cli.main(["run", "--config", str(path), "seed=4"]) == 0
    assert runner[1] == decode({**to_dict(runner[0]), "seed": 4})


def test_without_hydra_the_remedy_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    assert cli.main(["run", "method=rtn"]) == 2
    assert 'pip install "masq[cli]"' in capsys.readouterr().err


def test_a_sweep_goes_on_past_failing_cells_and_reports_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig]
) -> None:
    root = tmp_path / "a b" / "runs"
    arguments = ["run", "-m", "method=rtn,mas", "scheme=w4a8,w8a8,w4a4,w4a6", "preset=demo", f"output.root='{root}'"]
    argv = list(sys.argv)
    assert cli.main(arguments) == 1
    assert sys.argv == argv
    cells = [(config.method.name, config.scheme.name) for config in runner]
    assert cells == [(method, scheme) for method in ("rtn", "mas") for scheme in ("w4a8", "w8a8", "w4a4", "w4a6")]
    captured = capsys.readouterr()
    assert "4 of 8 runs finished" in captured.out
    assert captured.out.count("| w4a6") == 2
    for method in ("rtn", "mas"):
        assert f"failed: smol_omni-tri-w4a4-{method}: the loss must be finite (got: nan)" in captured.err
        assert f"failed: smol_omni-tri-w8a8-{method}: ZeroDivisionError: division by zero" in captured.err
    assert len(list(root.glob("smol_omni-*/record.json"))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b"], "Hydra left something outside of the runs"


def test_a_sweep_that_finishes_is_a_success(tmp_path: Path, runner: list[RunConfig]) -> None:
    assert cli.main(["run", "-m", "seed=0,1,2", "method=rtn", f"output.root={tmp_path}"]) == 0
    assert [config.seed for config in runner] == [0, 1, 2]


def test_a_cell_whose_process_died_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., None] = compose.write_outcome

    def lose_the_first(folder: Path, index: int, outcome: Any) -> None:
        if index:
            original(folder, index, outcome)

    monkeypatch.setattr(compose, "write_outcome", lose_the_first)
    assert cli.main(["run", "-m", "seed=0,1", "method=rtn", f"output.root={tmp_path}"]) == 1
    assert "ended without a result" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_config: RunConfig) -> RunRecord:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["masq.run"], "run", interrupted)
    assert cli.main(["run", f"output.root={tmp_path}"]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_tables_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], runner: list[RunConfig]) -> None:
    assert cli.main(["run", "-m", "method=rtn,mas", f"output.root={tmp_path}"]) == 0
    capsys.readouterr()
    assert cli.main(["table", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("| mas") < out.index("| rtn"), "folders are read in order of name"
    target = tmp_path / "tables" / "t.csv"
    assert cli.main(["table", f"{tmp_path}/*/record.json", "--format", "csv", "--output", str(target)]) == 0
    assert target.read_text().count("\n") == 3
    assert cli.main(["table", str(tmp_path), "--columns", "sqnr.text"]) == 0
    assert capsys.readouterr().out.splitlines()[0].count("|") == 4
    assert cli.main(["table", str(tmp_path), "--columns", "sqnr.test"]) == 2
    (tmp_path / "broken.json").write_text('{"identity": ')
    assert cli.main(["table", str(tmp_path / "broken.json")]) == 2


def test_doctor_prints_its_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("masq.doctor")
    module.report = lambda: "all is well"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "masq.doctor", module)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "all is well\n"


def test_the_configuration_folder_is_found_in_a_checkout_and_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compose.config_folder() == ROOT / "conf"
    monkeypatch.setattr(compose, "__file__", str(tmp_path / "masq" / "compose.py"))
    assert cli.main(["run", "method=rtn"]) == 2
    assert "configuration files are missing" in capsys.readouterr().err
    (tmp_path / "masq").mkdir()
    (tmp_path / "masq" / "conf").symlink_to(ROOT / "conf")
    assert compose.config_folder() == tmp_path / "masq" / "conf"
