"""The benchmark of model sizes: its checkpoints, its steps on a small model, its record and its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import random_checkpoint, sizes
from masq.compose import compose
from masq.files import read_json
from masq.models.architecture import count_parameters
from masq.models.zoo import nano

ROOT = Path(__file__).parent.parent
MADE_BY = {"threads": 1, "device_name": "a processor", "dirty": False}


def step(name: str, **changes: Any) -> dict[str, Any]:
    taken = {"seconds": 90.0, "cpu_seconds": 60.0, "peak_memory_bytes": 2_500_000_000}
    return {"step": name, **taken, "provenance": MADE_BY, **changes}


@pytest.mark.parametrize("name", random_checkpoint.SHAPES)
def test_checkpoints_have_the_published_sizes(name: str) -> None:
    model = random_checkpoint.model_of(name)
    sizes_of = compose([f"model={name}", "modality=dual"]).model.architecture
    assert sizes_of is not None
    assert sum(one.numel() for one in model.parameters()) == sum(count_parameters(sizes_of).values())


def test_every_weight_is_cut_from_the_pool() -> None:
    pool = torch.arange(7.0)
    for start, count in ((0, 3), (5, 2), (5, 4), (6, 20)):
        cut = random_checkpoint._cut(pool, start, count)
        assert cut.tolist() == [(start + index) % 7 for index in range(count)]
    assert pool.tolist() == list(range(7))


def test_steps_take_the_place_of_earlier_ones() -> None:
    found: dict[str, Any] = {"models": {}}
    for name, seconds in (("rtn", 1.0), ("masquant", 2.0), ("rtn", 3.0)):
        sizes.add(found, "one", step(name, seconds=seconds))
    sizes.add(found, "other", step("rtn"))
    assert [(one["step"], one["seconds"]) for one in found["models"]["one"]] == [("rtn", 3.0), ("masquant", 2.0)]
    assert len(found["models"]["other"]) == 1


@pytest.mark.parametrize(("verdicts", "says"), [((True, True), "same bits"), ((True, False), "other bits")])
def test_the_table_says_what_was_found(verdicts: tuple[bool, bool], says: str) -> None:
    killed = step("killed", same_blocks=verdicts[0], same_record=verdicts[1])
    text = sizes.render({"models": {"a_model": [step("rtn", planned_bytes=2.4e9), killed]}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "a_model" in line]
    assert rows == [
        ["a_model", "rtn", "60", "90", "2.50", "2.40", ""],
        ["a_model", "killed", "60", "90", "2.50", "", says],
    ]
    assert "1 thread(s) on a processor" in text


def test_a_step_that_fails_says_why() -> None:

    with pytest.raises(RuntimeError, match="ended with 3: no such thing"):
        sizes.timed([sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])


@pytest.mark.slow
def test_all_steps_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.TASKS, "nano_vl", ("read", "manual"))
    nano.save_published("nano_vl", tmp_path / "nano_vl", 60_000)
    output, table = tmp_path / "sizes.json", tmp_path / "sizes.md"
    places = [f"--output={output}", f"--table={table}", "--threads=1"]
    sizes.main(["nano_vl", str(tmp_path), "--methods", "rtn", "masquant", "--export", "masquant", "--resume", *places])
    found = read_json(output)
    steps = found["models"]["nano_vl"]
    rtn, killed, masquant, export, answers = steps
    assert [rtn["step"], killed["step"], masquant["step"]] == [
        "rtn",
        "rtn, killed after 1 and 2 of 3 blocks",
        "masquant",
    ]
    assert (killed["same_blocks"], killed["same_record"]) == (True, True)
    assert (export["step"], export["files"]) == ("export, masquant", 1)
    assert export["bytes"] == pytest.approx(1e5, rel=0.9)
    assert answers["step"] == "load and generate 4 tokens, masquant"
    assert all(one["seconds"] > 0.1 and one["cpu_seconds"] > 0.1 for one in steps)
    # Python with torch takes 200 MB at least, and the model next to nothing.
    assert all(2e8 < one["peak_memory_bytes"] < 2e9 for one in steps)
    assert all(one["provenance"]["threads"] == 1 for one in steps)
    assert table.read_text() == sizes.render(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano_vl", "runs", "sizes.json", "sizes.md"]
    assert not list((tmp_path / "runs" / "nano_vl").iterdir())


def test_the_committed_table_is_that_of_the_record() -> None:
    record = ROOT / "results" / "bench" / "sizes.json"
    if not record.exists():
        pytest.skip("not measured yet")
    found = read_json(record)
    assert (ROOT / "results" / "tables" / "sizes.md").read_text() == sizes.render(found)
    for name, steps in found["models"].items():
        assert any(name.startswith(known) for known in sizes.TASKS)
        assert all(one["provenance"]["dirty"] is False for one in steps)
        assert all(one["same_blocks"] and one["same_record"] for one in steps if "same_blocks" in one)
