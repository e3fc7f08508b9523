from __future__ import annotations

import mmap
import sys

import pytest

from masq.report.memory import peak_memory, reset_peak_memory

SIZE = 300_000_000


def touched(size: int) -> mmap.mmap:
    """Pages that the kernel gave and takes back at once, whatever the allocator keeps."""
    pages = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        pages[start] = 1
    return pages


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux alone")
def test_the_peak_counts_from_the_reset_on() -> None:
    touched(SIZE // 10).close()
    block = touched(SIZE)
    high = peak_memory("cpu")
    block.close()
    reset_peak_memory("cpu")
    low = peak_memory("cpu")
    assert low < high - SIZE // 2
    again = touched(SIZE // 2)
    assert peak_memory("cpu") > low + SIZE // 4
    again.close()
