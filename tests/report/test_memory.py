from __future__ import annotations

import sys

import numpy as np
import pytest

from masq.report.memory import peak_memory, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_peak_counts_from_the_reset_on() -> None:
    size = 300_000_000
    block = np.ones(size, dtype=np.uint8)
    high = peak_memory("cpu")
    assert high > size * int(block[0])
    del block
    reset_peak_memory("cpu")
    low = peak_memory("cpu")
    assert low < high - size // 2
    again = np.ones(size // 2, dtype=np.uint8)
    assert peak_memory("cpu") > low + size // 4 * int(again[0])
