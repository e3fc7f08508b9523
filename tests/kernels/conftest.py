"""Where tests of GPU kernels run, and memory that is dirty."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from masq.kernels.cuda.kernel import CudaKernel
from tests.kernels.emulating import emulated_kernel
from tests.kernels.interpreting import INTERPRETED

GARBAGE = 0x55


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of Triton kernels run in this process if it interprets, else on a GPU if there is one."""
    if "triton_device" in metafunc.fixturenames:
        on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("triton_device", ["cpu" if INTERPRETED else on_gpu], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A process that interprets runs those tests and no others."""
    if INTERPRETED:
        items[:] = [item for item in items if "triton_device" in getattr(item, "fixturenames", ())]


class Target(NamedTuple):
    """Where a test of CUDA kernels runs."""

    kernel: CudaKernel
    device: str


@pytest.fixture
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Device of the tensors; whatever kernels allocate is filled with NaN or garbage first."""
    return _dirty(request.param, monkeypatch)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """CUDA kernels in the emulator and on a GPU, there from the library of ``--cuda-library`` if it is given."""
    if request.param == "emulated":
        return Target(emulated_kernel(), _dirty("cpu", monkeypatch))
    given = request.config.getoption("--cuda-library")
    return Target(CudaKernel(Path(given) if given else None), _dirty("cuda", monkeypatch))


def _dirty(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: filled(make(*a, **k)))
    return device


@pytest.fixture
def launches() -> ModuleType:
    """The launches; Triton is imported no sooner."""
    from masq.kernels.triton import ops

    return ops
