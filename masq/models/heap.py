"""Freed memory back to the operating system: an allocator keeps it, and the process stays as large as it ever was."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAPPED_BYTES = 1 << 20
"""Below it an allocation costs more pages of its own than it is worth."""
_M_MMAP_THRESHOLD = -3  # of malloc.h


def give_back() -> bool:
    """Have the C library return every page that holds no live allocation.

    glibc maps an allocation apart only above a threshold that grows up to 32 MiB with what is freed; smaller tensors,
    which are most of a tower, lie in a heap that shrinks only from its end (malloc_trim(3)).

    Returns:
        Whether the C library can do that; others than glibc return memory in their own time.
    """
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


@cache
def map_large() -> bool:
    """Have the C library map every allocation from ``MAPPED_BYTES`` on apart, from now on, in the whole process.

    Memory of a tensor is then given back as soon as the tensor is gone. Otherwise what is free between others stays,
    as in the heap that the weights of a tower leave behind, over which later tensors lie scattered.
    A threshold that the user has set (MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) is left alone.

    Returns:
        Whether that was done.
    """
    own = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES))


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of glibc, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
