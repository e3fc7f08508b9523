"""Peak memory since a moment, so that a cell of a sweep does not report the peak of the cell before it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def reset_peak_memory(device: str) -> None:
    """Forget the peaks so far, of the process and of a CUDA device; where the system cannot, they stay."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Largest resident memory of the process since the reset, plus the largest GPU allocation, in bytes."""
    peak = _resident_peak()
    if device.startswith("cuda"):
        import torch

        peak += torch.cuda.max_memory_allocated(device)
    return peak


def _resident_peak() -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        # Linux reports kibibytes; without /proc it is the peak of the whole process.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
