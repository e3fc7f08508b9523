"""The benchmark of methods: its clock, its list of stages, and the table that is committed."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import pytest

from experiments.bench import methods as bench
from experiments.bench import sizes
from masq.compose import compose
from masq.files import read_json

ROOT = Path(__file__).parent.parent


def test_a_stage_called_by_another_is_counted_once() -> None:
    stopwatch = bench.Stopwatch()
    inner = stopwatch.watch("inner", lambda: time.sleep(0.05))

    def work() -> None:
        time.sleep(0.02)
        inner()
        time.sleep(0.02)

    started = time.perf_counter()
    stopwatch.watch("outer", work)()
    total = time.perf_counter() - started
    assert stopwatch.seconds["inner"] >= 0.05
    assert stopwatch.seconds["outer"] >= 0.04
    assert sum(stopwatch.seconds.values()) == pytest.approx(total, abs=0.01)


def test_a_failing_stage_stops_its_clock() -> None:
    stopwatch = bench.Stopwatch()
    with pytest.raises(ZeroDivisionError):
        stopwatch.watch("broken", lambda: 1 / 0)()
    counted = dict(stopwatch.seconds)
    stopwatch.watch("next", lambda: None)()
    assert stopwatch.seconds["broken"] == counted["broken"]


def test_every_stage_is_where_the_benchmark_looks_for_it() -> None:
    for target in [*(one for targets in bench.STAGES.values() for one in targets), *bench.REGISTRIES.values()]:
        module, _, name = target.partition(":")
        assert hasattr(import_module(module), name), target


def test_every_method_is_measured_with_so_many_samples() -> None:
    files = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - {"none"}
    assert set(bench.METHODS) == files
    for method in bench.METHODS:
        config = compose(bench.overrides(method, "w4a6", 128, 2, "runs"))
        assert (config.method.name, config.calibration.samples, config.threads) == (method, 128, 2)
        assert not config.calibration.cache


def test_the_committed_table_is_that_of_the_record() -> None:
    record = ROOT / "results" / "bench" / "methods.json"
    if not record.exists():
        pytest.skip("not measured yet")
    found = read_json(record)
    assert (ROOT / "results" / "tables" / "methods_time.md").read_text() == bench.render(found)
    assert found["provenance"]["dirty"] is False
    assert {cell["method"] for cell in found["cells"]} <= set(bench.METHODS)


def test_the_committed_sizes_are_those_of_the_record() -> None:
    """Every model within its memory; a run that was killed twice ends with the bits of one that was not."""
    found = read_json(ROOT / "results" / "bench" / "sizes.json")
    assert (ROOT / "results" / "tables" / "sizes.md").read_text() == sizes.render(found)
    limits = {"qwen2_5_vl_3b": 10 * 2**30, "qwen2_5_omni_3b": 10 * 2**30, "qwen2_5_vl_7b": 12 * 2**30}
    assert found["models"].keys() == limits.keys()
    for name, steps in found["models"].items():
        assert all(not step["provenance"]["dirty"] for step in steps)
        made = [step for step in steps if not step["step"].startswith("load and generate")]
        assert max(step["peak_memory_bytes"] for step in made) < limits[name]
        planned = [step for step in steps if "planned_bytes" in step]
        assert planned
        for step in planned:
            assert 0.9 < step["peak_memory_bytes"] / step["planned_bytes"] < 1.1, step["step"]
    [killed] = [step for step in found["models"]["qwen2_5_vl_3b"] if "same_blocks" in step]
    assert killed["same_blocks"]
    assert killed["same_record"]
