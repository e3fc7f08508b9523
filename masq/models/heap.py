"""Freed memory back to the operating system: an allocator keeps it, and the process stays as large as it ever was."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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
