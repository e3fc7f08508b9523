"""Compile what a launch would run, for a GPU that need not be there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from masq.kernels.triton import ops, tiles

PROCESSORS = {80: 108, 89: 128, 90: 132}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: of the function.
        registers: of a thread.
        local: bytes of a thread outside its registers: what was spilled, and what is on a stack.
        shared: bytes of shared memory of a program.
        ptx: assembly before, and ``sass`` after register allocation.
    """

    name: str
    registers: int
    local: int
    shared: int
    ptx: str
    sass: str

    @classmethod
    def of(cls, kernel: Any) -> Compiled:
        """Read a compiled kernel with the tools that Triton brings."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage, sass = (
                subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")
            )
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        local = found["STACK"] + found["LOCAL"]
        shared = kernel.metadata.shared
        return cls(kernel.metadata.name, found["REG"], local, shared, kernel.asm["ptx"], sass)


class _Driver:
    """A GPU of one compute capability as far as compiling goes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def for_gpu(capability: int) -> Iterator[list[Any]]:
    """Inside, launches compile for a GPU and run nothing; what they compiled is in the list."""
    made: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append(kernel)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", compile_only)
        patch.setattr(ops, "gpu", lambda _device: (tiles.table_of(capability), PROCESSORS[capability]))
        patch.setattr(triton.runtime.driver, "_active", _Driver(capability))
        yield made
