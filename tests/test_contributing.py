"""What CONTRIBUTING.md says of new methods and benchmarks, done as it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from masq import compose
from masq.evaluation.benchmarks import BENCHMARKS
from masq.run import run
from tests.test_run import write_split

ROOT = Path(__file__).parent.parent


def block(heading: str, language: str) -> str:
    """The first fenced block of a language under a heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index(f"## {heading}\n") :]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_a_new_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", folder)
    (folder / "method" / "awq_gptq.yaml").write_text(block("A new method", "yaml"))
    monkeypatch.setattr(compose, "config_folder", lambda: folder)
    splits = {name: write_split(tmp_path / f"{name}.parquet", name, 2, seed) for name, seed in SEEDS.items()}
    config = compose.compose(
        ["model=nano_omni", "scheme=w4a6", "method=awq_gptq", "evaluation=fidelity", f"output.root={tmp_path / 'runs'}"]
        + [f"{name}.source={path}" for name, path in splits.items()]
        + ["calibration.samples_per_task=2", "evaluation.samples_per_task=2"]
    )
    record = run(config)
    assert (record.status, record.method) == ("finished", "awq_gptq")
    assert all("search" in found and "rounding" in found for found in record.blocks)


SEEDS = {"calibration": 100, "evaluation": 200}


def test_a_new_benchmark_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(BENCHMARKS, "_targets", dict(BENCHMARKS._targets))
    exec(compile(block("A new benchmark", "python"), "CONTRIBUTING.md", "exec"), {})  # noqa: S102
    found = BENCHMARKS.get("piqa")
    assert found.task in TaskManager().all_tasks
    answers = [("-1.0", "False"), ("-2.0", "False")]
    logged = [{"doc_id": i, "doc": {"goal": str(i)}, "acc": float(i), "filtered_resps": answers} for i in range(2)]
    outcomes = found.metrics[0].outcomes(logged)
    assert outcomes.numerators == (0.0, 1.0)
