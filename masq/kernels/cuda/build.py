"""The CUDA kernels, compiled by nvcc when a GPU first needs them, and kept for later runs.

One library for one compute capability lies in the user's cache folder, under a hash of the sources, the flags and the
capability. A machine without nvcc takes one that another has built: ``python -m masq.kernels.cuda.build 80 89 --to
FOLDER`` writes them under the names by which they are looked for, to be copied into the cache folder of that machine
(``~/.cache/masq/kernels``), or to be given to ``CudaKernel(library=...)``. They need the driver alone: the runtime is
linked into them.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from masq.kernels.build import BuildError, cache_folder

FOLDER = Path(__file__).parent / "csrc"
SOURCES = (FOLDER / "masq.cu",)
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
COMPILER = "nvcc"
OLDEST = 80
"""The first compute capability with the instructions in use, 10 * major + minor."""
# Scaled results are rounded once at each step, as torch rounds them: no fused multiply-add.
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-fmad=false")
_SECONDS = 600


@cache
def library(capability: int) -> ctypes.CDLL:
    """The loaded library for a compute capability, compiled now if no earlier process did.

    Raises:
        BuildError: no nvcc and no library, or it does not compile the sources.
    """
    return load(find_built(capability) or _build(capability))


def load(path: Path) -> ctypes.CDLL:
    """A library built from these sources.

    Raises:
        BuildError: it does not load, or it was built from others.
    """
    try:
        found = ctypes.CDLL(str(path))
        found.masq_cuda_key.restype = ctypes.c_char_p
        key = found.masq_cuda_key().decode()
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path.name} is no library of CUDA kernels that loads here: {error}") from error
    if key != source_key():
        raise BuildError(
            f"{path.name} was built from other sources ({key}, these are {source_key()}); "
            f"build it again: python -m {__name__} CAPABILITY --to FOLDER"
        )
    return found


def find_compiler() -> str | None:
    """The path of nvcc."""
    return shutil.which(COMPILER)


def find_built(capability: int) -> Path | None:
    """The library of an earlier build."""
    path = cache_folder() / file_name(capability)
    return path if path.is_file() else None


def file_name(capability: int) -> str:
    """Under which a library is looked for."""
    return f"masq-cuda-{source_key()}-sm{capability}.so"


def source_key() -> str:
    """Of sources and flags; a library carries it."""
    digest = hashlib.sha256()
    for part in (*FLAGS, sys.platform, os.uname().machine):
        digest.update(part.encode() + b"\0")
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def compile_sources(compiler: str, capability: int, target: Path, extra: tuple[str, ...] = ()) -> str:
    """Compile all sources for one compute capability into ``target``.

    Args:
        compiler: path of nvcc.
        capability: 10 * major + minor.
        target: the library.
        extra: further options.

    Returns:
        What nvcc reports on its standard error.

    Raises:
        BuildError: the compiler fails or takes longer than ten minutes.
    """
    generated = f"-gencode=arch=compute_{capability},code=sm_{capability}"
    key = f'-DMASQ_KEY="{source_key()}"'
    command = [compiler, *FLAGS, generated, key, *extra, *map(str, SOURCES), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(compiler).name} could not be run: {error}") from error
    if done.returncode:
        said = (done.stderr + done.stdout).splitlines()
        lines = [line for line in said if "error" in line or "fatal" in line] or said
        raise BuildError(
            f"{Path(compiler).name} does not compile the kernels for compute capability "
            f"{capability // 10}.{capability % 10}: {lines[0] if lines else 'no message'}"
        )
    return done.stderr


def build(capability: int, folder: Path) -> Path:
    """Compile beside the place and rename: of several processes each leaves a whole library, and the last one stays.

    Raises:
        BuildError: no nvcc, it does not compile the sources, or the folder cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"no {COMPILER} on the path and no {file_name(capability)} in {cache_folder()}; install the CUDA toolkit, "
            f"or build the library elsewhere (python -m {__name__} {capability} --to FOLDER) and copy it there"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / file_name(capability)
            compile_sources(compiler, capability, made)
            return made.replace(folder / made.name)
    except OSError as error:
        raise BuildError(f"compiled kernels cannot be written to {folder.name}: {error.strerror}") from error


def _build(capability: int) -> Path:
    return build(capability, cache_folder())


def main(arguments: list[str] | None = None) -> None:
    """Build libraries for machines without nvcc."""
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}", description=main.__doc__)
    parser.add_argument("capabilities", nargs="+", type=int, help="such as 80 86 89")
    parser.add_argument("--to", type=Path, default=cache_folder(), help="folder, by default the cache")
    given = parser.parse_args(arguments)
    for capability in given.capabilities:
        build(capability, given.to)


if __name__ == "__main__":
    main()
