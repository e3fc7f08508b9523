"""The C++ kernels, compiled by the system's compiler when they are first used, and kept for later runs.

The library lies in the user's cache folder under a hash of everything it was made from: sources, flags, compiler and
OpenMP runtime. Nothing is compiled at import, and no compiler is needed once the library is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCES = tuple(sorted((Path(__file__).parent / "csrc").glob("*.cpp")))
HEADERS = tuple(sorted((Path(__file__).parent / "csrc").glob("*.h")))
COMPILERS = ("c++", "g++", "clang++")
# Scaled results are rounded once at each step, as torch rounds them: no fused multiply-add.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_SECONDS = 120


class BuildError(RuntimeError):
    """Why there is no library; the message is shown as the reason why a kernel is not supported."""


@cache
def library() -> ctypes.CDLL:
    """The loaded library, compiled now if no earlier process did.

    Raises:
        BuildError: no compiler, or it does not compile the sources.
    """
    compiler = find_compiler()
    if compiler is None and not _find_built():
        raise BuildError(f"no C++ compiler on the path ({', '.join(COMPILERS)}); install one, for example g++")
    path = _find_built() or _build(str(compiler))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernels do not load: {error}") from error


def cache_folder() -> Path:
    """Where compiled kernels are kept: below ``XDG_CACHE_HOME``, else ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "masq" / "kernels"


def find_compiler() -> str | None:
    """The first compiler on the path."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def compile_sources(compiler: str, target: Path, extra: tuple[str, ...] = (), *, shared: bool = True) -> None:
    """Compile all sources into ``target``.

    Args:
        compiler: path of a C++ compiler that takes GCC's options.
        target: the library, or the program if not ``shared``.
        extra: further options and files.
        shared: whether a shared library is wanted.

    Raises:
        BuildError: the compiler fails or takes longer than two minutes.
    """
    command = [compiler, *FLAGS, *(["-shared"] if shared else []), *map(str, SOURCES), *extra, "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(compiler).name} could not be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{Path(compiler).name} does not compile the kernels: {lines[0] if lines else 'no message'}")


def openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded: a second one would bring threads of its own that wait beside its."""
    import torch

    folders = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    return next((file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))), None)


def _key() -> str:
    """Of what the library is made: sources, flags, runtime and Python's platform."""
    digest = hashlib.sha256()
    runtime = openmp_runtime()
    for part in (*FLAGS, sys.platform, os.uname().machine, runtime.name if runtime else "no OpenMP"):
        digest.update(part.encode() + b"\0")
    for source in (*SOURCES, *HEADERS):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _path() -> Path:
    return cache_folder() / f"masq-{_key()}.so"


def _find_built() -> Path | None:
    path = _path()
    return path if path.is_file() else None


def _build(compiler: str) -> Path:
    """Compile beside the place and rename: of several processes each leaves a whole library, and the last one stays."""
    path, runtime = _path(), openmp_runtime()
    # Compiled for OpenMP, but linked with the runtime that is already there instead of the compiler's own.
    extra = (
        ("-fopenmp", "-nodefaultlibs", str(runtime), "-lstdc++", "-lm", "-lgcc_s", "-lgcc", "-lc") if runtime else ()
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            compile_sources(compiler, made, extra)
            made.replace(path)
    except OSError as error:
        raise BuildError(f"compiled kernels cannot be written to {path.parent.name}: {error.strerror}") from error
    return path
