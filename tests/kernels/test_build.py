"""Kernels are built once, kept, and clean under the sanitizers; without a compiler the reason is told."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from masq.kernels import build
from masq.kernels.build import BuildError

DRIVER = Path(__file__).parent / "sanitized.cpp"
# Less optimization than the library has: the sanitizers see the same accesses, and compiling takes a seventh.
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp", "-g1")

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler on the path")


@needs_compiler
def test_every_path_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    program, compiler, nothing = tmp_path / "sanitized", str(build.find_compiler()), tmp_path / "nothing.cpp"
    nothing.write_text("int main() {}")
    if subprocess.run([compiler, *SANITIZE, nothing, "-o", program], capture_output=True, check=False).returncode:
        pytest.skip("the sanitizers are not installed")
    build.compile_sources(compiler, program, (str(DRIVER), *SANITIZE), shared=False)
    # A pool of threads that lives until the end is no leak.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr[-2000:]


@needs_compiler
def test_it_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Several processes at once: each finds a whole library. Without optimization, which takes most of the time.
    code = (
        "from masq.kernels import build\n"
        "build.FLAGS = ('-O0', *(flag for flag in build.FLAGS if flag != '-O3'))\n"
        "print(build.library().masq_best_isa())"
    )
    with ThreadPoolExecutor(2) as pool:
        runs = list(
            pool.map(lambda _: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True), range(2))
        )
    assert [one.returncode for one in runs] == [0, 0], runs[0].stderr
    [kept] = (tmp_path / "masq" / "kernels").iterdir()
    # With the library there, no compiler is needed.
    monkeypatch.setenv("PATH", "")
    before = kept.stat().st_mtime_ns
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert again.stdout == runs[0].stdout
    assert kept.stat().st_mtime_ns == before


def test_other_sources_make_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._path()
    changed = tmp_path / "linear.cpp"
    changed.write_bytes(build.SOURCES[0].read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
    assert build._path() != before
    monkeypatch.setattr(build, "FLAGS", ("-O1",))
    assert len({before, build._path()}) == 2


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        build.library.__wrapped__()


@needs_compiler
def test_what_does_not_compile_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f( {")
    monkeypatch.setattr(build, "SOURCES", (broken,))
    with pytest.raises(BuildError, match="does not compile"):
        build.library.__wrapped__()
    assert not list((tmp_path / "masq" / "kernels").iterdir())
