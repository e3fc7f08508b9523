"""What tests of Triton kernels share: how they run in its interpreter.

Triton decides when it is imported whether it interprets, so without a GPU the tests run in a process of their own.
"""

from __future__ import annotations

import dataclasses
import os

import torch

from masq.kernels.triton.kernel import TritonKernel
from masq.numerics.scheme import TensorFormat
from tests.kernels import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = TritonKernel()
ACTIVATION = cases.per_token(8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(given, device):
    """Tensors, and all that hold them, on a device."""
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, tuple):
        return tuple(moved(one, device) for one in given)
    if dataclasses.is_dataclass(given) and not isinstance(given, TensorFormat):
        values = {field.name: moved(getattr(given, field.name), device) for field in dataclasses.fields(given)}
        return type(given)(**values)
    return given


def run(device, x, packed, activation, **given):
    on_device = {name: moved(value, device) for name, value in given.items()}
    return cases.run(KERNEL, x.to(device), moved(packed, device), activation, **on_device).cpu()
