"""Memory of weights that are let go of is the system's again."""

from __future__ import annotations

import os
import subprocess
import sys
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


LARGE = """
import os
from pathlib import Path
import torch
from masq.models.heap import map_large

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

done = map_large()
large = torch.ones(2048, 2048)
# Freed, it would raise a threshold that moves, and matrices of 2 MiB would lie in the heap.
del large
before = resident_bytes()
tensors = [torch.ones(512, 1024) for _ in range(60)]
kept = tensors[9::10]
del tensors
print(done, (resident_bytes() - before) / (60 << 21))
"""


@pytest.mark.parametrize("by_user", [False, True])
def test_large_tensors_do_not_share_a_heap(by_user: bool) -> None:
    """What stays between them keeps nothing else in memory; a threshold of the user's own is left alone."""
    own = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    clean = {key: value for key, value in os.environ.items() if key not in own}
    command = [sys.executable, "-c", LARGE]
    found = subprocess.run(command, env=clean | (own if by_user else {}), capture_output=True, text=True, check=True)
    done, share = found.stdout.split()
    assert done == str(not by_user)
    assert float(share) > 0.8 if by_user else float(share) < 0.3
