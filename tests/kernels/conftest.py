"""Where tests of Triton kernels run, and memory that is dirty."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.kernels.interpreting import INTERPRETED

GARBAGE = 0x55


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of Triton kernels run in this process if it interprets, else on a GPU if there is one."""
    if "triton_device" in metafunc.fixturenames:
        on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("triton_device", ["cpu" if INTERPRETED else on_gpu], indirect=True)


@pytest.fixture
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Device of the tensors; whatever kernels allocate is filled with NaN or garbage first."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, make=make, **k: filled(make(*a, **k)))
    return request.param


@pytest.fixture
def launches() -> ModuleType:
    """The launches; Triton is imported no sooner."""
    from masq.kernels.triton import ops

    return ops
