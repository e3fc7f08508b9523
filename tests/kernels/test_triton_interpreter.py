"""Triton kernels without a GPU, in a process of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.interpreting import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is what it runs")
@pytest.mark.parametrize("names", [("test_triton",), ("test_triton_rows", "test_triton_layer")], ids="+".join)
def test_kernels_in_the_interpreter(names):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    files = [str(HERE / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
