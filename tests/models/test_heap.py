"""Memory of weights that are let go of is the system's again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from masq.models.heap import give_back
from masq.models.residence import StreamedResidence
from masq.models.streaming import WrittenWeights

SIDE, COUNT = 120, 2000
"""Matrices of 56 KiB, below glibc's smallest threshold for memory of their own: 110 MiB of them lie in its heap."""
NUM_BYTES = SIDE * SIDE * 4 * COUNT

pytestmark = pytest.mark.skipif(not give_back(), reason="needs malloc_trim of glibc")


def resident_bytes() -> int:
    """Of this process, in pages that the system gave it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_what_is_freed_leaves_the_process() -> None:
    # Other tests left free memory, which these tensors would take first.
    give_back()
    before = resident_bytes()
    tensors = [torch.ones(SIDE, SIDE) for _ in range(COUNT)]
    # What stays lies between, so that the heap cannot shrink from its end.
    kept = tensors[::100]
    assert resident_bytes() - before > 0.8 * NUM_BYTES
    del tensors
    assert give_back()
    assert resident_bytes() - before < 0.3 * NUM_BYTES
    assert len(kept) == COUNT // 100


def test_a_part_that_goes_away_leaves_the_process(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(COUNT))))
    source = WrittenWeights(model, tmp_path / "model.safetensors")
    residence = StreamedResidence(model, [model[0]], source, torch.device("cpu"), tmp_path)
    give_back()
    before, kept = resident_bytes(), []
    with residence.present(model[0]):
        kept.append(torch.ones(SIDE, SIDE))
        assert resident_bytes() - before > 0.8 * NUM_BYTES
    assert resident_bytes() - before < 0.3 * NUM_BYTES
