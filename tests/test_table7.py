"""The benchmarks of 7B shapes at a toy size: every row computes, memory falls, and the paper's numbers stand beside."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.bench import gpu_decode, gpu_profile, packed_model, table7
from masq.files import read_json

ROOT = Path(__file__).parent.parent
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "rope_parameters": {**packed_model.ROPE, "mrope_section": [8, 12, 12]},
}


def test_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_model.SHAPES, table7.SHAPE, TINY)
    monkeypatch.setattr(table7, "PREFILL", 24)
    cells = table7.measure(["w4a8"], "cpu", num_blocks=2, batch=2, budget=0.05)
    fused = [f"w4a8, {row}{table7.FUSED}" for row in table7.FUSED_ROWS]
    assert [cell["name"] for cell in cells] == [table7.BASE, *table7.names("w4a8"), *fused]
    base, shared, *ranks = (cell["bytes"] for cell in cells)
    assert base == 2 * 2 * (3 * 128 * 256 + 128 * 128 * 2 + 128 * 64 * 2 + 128 + 64 * 2)
    assert shared < base / 3
    assert shared < ranks[0] <= ranks[1] <= ranks[2]
    assert all(cell["kernels"] for cell in cells[1:])
    assert all(math.isfinite(cell["ratio"]) and cell["seconds"] > 0 for cell in cells)


def test_every_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is put back: the cache would overflow at the second."""
    monkeypatch.setitem(packed_model.SHAPES, gpu_decode.SHAPE, TINY)
    monkeypatch.setattr(gpu_decode, "PROMPT", 24)
    cells = gpu_decode.measure("cpu", num_blocks=2, budget=0.05)
    packed = [f"{scheme}{more}" for scheme in gpu_decode.SCHEMES for more in ("", ", fused")]
    assert [cell["name"] for cell in cells] == [name + gpu_decode.EAGER for name in (gpu_decode.BASE, *packed)]
    assert all(math.isfinite(cell["ratio"]) and cell["seconds"] > 0 for cell in cells)
    made = {"device_name": "a GPU", "libraries": {"torch": "2"}}
    table = gpu_decode.render({"provenance": made, "cells": cells})
    assert len(table.splitlines()) == len(cells) + 4


def test_the_paper_stands_beside() -> None:
    assert table7._paper(1, table7.BASE) == ["1", "1"]
    assert table7._paper(8, "w4a4, rank ratio 0.05") == table7._paper(8, "w4a8, rank ratio 0.05")
    assert table7._paper(1, "w4a8, rank ratio 0.02" + table7.FUSED) == table7._paper(1, "w4a8, rank ratio 0.02")
    faster, smaller = (float(number) for number in table7._paper(1, f"w4a4, {table7.SHARED}"))
    assert faster > float(table7._paper(1, "w4a4, rank ratio 0.05")[0]) > 1
    assert smaller > 1
    assert table7._paper(3, "w4a4, rank ratio 0.05") == ["-", "-"]


def test_the_committed_table_is_that_of_the_record() -> None:
    record = ROOT / "results" / "bench" / "table7.json"
    if not record.exists():
        pytest.skip("not measured yet")
    measured = read_json(record)
    assert measured["provenance"]["dirty"] is False
    assert (ROOT / "results" / "tables" / "table7.md").read_text() == table7.render(measured)


def test_the_committed_profile_is_that_of_its_record() -> None:
    assert gpu_profile.TABLE.read_text() == gpu_profile.render(read_json(gpu_profile.RECORD))
