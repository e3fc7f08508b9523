"""Every test runs offline, on the CPU, with fixed seeds. Torch is seeded only where a test has imported it."""

from __future__ import annotations

import os
import random
import sys

# Set before any library reads them: the first import of a hub client or of torch decides.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Unit tests multiply tiny matrices: one thread is faster than handing work around, and workers do not collide.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("masq", deadline=None, derandomize=True, database=None)
settings.load_profile("masq")


def pytest_addoption(parser: pytest.Parser) -> None:
    """A machine with a GPU and without nvcc takes a library of CUDA kernels that another has built."""
    parser.addoption("--cuda-library", help="file made by python -m masq.kernels.cuda.build, for tests marked gpu")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; a machine without a GPU skips that half, and says so."""
    if request.param == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param
