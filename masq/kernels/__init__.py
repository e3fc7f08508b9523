"""Arithmetic of quantized linears, chosen once per machine. Each kernel is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from masq.errors import ConfigError
from masq.registry import Registry

if TYPE_CHECKING:
    from masq.kernels.base import Kernel, LinearSpec

AUTO = "auto"

KERNELS: Registry[type[Kernel]] = Registry("kernel")
KERNELS.register("cpu", "masq.kernels.cpu:CpuKernel")
KERNELS.register("triton", "masq.kernels.triton.kernel:TritonKernel")
KERNELS.register("cuda", "masq.kernels.cuda.kernel:CudaKernel")
KERNELS.register("torch", "masq.kernels.torch_int8:TorchKernel")
KERNELS.register("reference", "masq.kernels.reference:ReferenceKernel")

PREFERENCE = ("cpu", "triton", "cuda", "torch", "reference")
"""Fastest first as far as that is known (``cuda`` was never timed); the last runs everything everywhere."""

FUSING = ("cpu", "triton", "reference")
"""Those that quantize rows as they come out of a norm or a gate (``Kernel.fuses``)."""


def select(name: str, spec: LinearSpec) -> Kernel:
    """The kernel called ``name`` for a linear, or with ``auto`` the first in ``PREFERENCE`` that can run it.

    Raises:
        ConfigError: no such kernel, or it cannot run this linear; the message gives its reasons.
    """
    refused = []
    for candidate in PREFERENCE if name == AUTO else (name,):
        kernel = KERNELS.get(candidate)()
        reasons = kernel.not_supported_reasons(spec)
        if not reasons:
            return kernel
        refused.append(f"{candidate}: {'; '.join(reasons)}")
    raise ConfigError(
        f"a linear of {spec.in_features} inputs and {spec.out_features} outputs needs a kernel that can run it",
        value=", ".join(refused),
        remedy=f"use kernel={AUTO}, or one of {', '.join(KERNELS.names())}; masq doctor explains each",
    )
