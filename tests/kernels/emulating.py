"""CUDA kernels without a GPU: their sources as a library for a processor, see emulated.h."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

from masq.kernels.build import find_compiler
from masq.kernels.cuda import build
from masq.kernels.cuda.kernel import CudaKernel

HERE = Path(__file__).parent
# Fibers jump between stacks, which the checks of fortified functions take for an error.
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")


def compile_emulator(target: Path, includes: Path = build.FOLDER, optimize: str = "-O2") -> None:
    """The kernels of ``csrc``, or of a folder with changed copies of it."""
    compiler = find_compiler()
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator needs a C++ compiler and an x86-64 processor")
    key = f'-DMASQ_KEY="{build.source_key()}"'
    command = [compiler, *FLAGS, optimize, key, f"-I{includes}", str(HERE / "emulated.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@cache
def emulated_kernel() -> CudaKernel:
    """The kernel on the emulator, compiled once a process."""
    folder = Path(tempfile.mkdtemp(prefix="masq-emulated-"))
    compile_emulator(folder / "emulated.so")
    return CudaKernel(folder / "emulated.so")


def functions(kernel: CudaKernel) -> ctypes.CDLL:
    """What the emulator offers beyond the kernels."""
    import torch

    found = kernel._library(torch.device("cpu"))
    found.masq_emulated_conflicts.restype = ctypes.c_int64
    return found
