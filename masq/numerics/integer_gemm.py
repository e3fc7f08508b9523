"""Exact int8 matrix product, the same integers on every device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

from masq.errors import NumericalError

# K * 128 * 128 <= 2^24: every partial sum, in any order, is an integer that float32 holds exactly.
FLOAT_CHUNK = 1024
# K * 128 * 128 <= 2^31 - 1: the int32 result cannot overflow.
MAX_INNER = (2**31 - 1) // 2**14
# With one inner channel torch._int_mm leaves its result uninitialised (seen with torch 2.14.1 on a CPU with VNNI and no
# AMX); so short products are no faster there anyway.
_MIN_INNER = 8
# Shape rules of torch._int_mm on CUDA.
_CUDA_MULTIPLE = 8
_CUDA_MIN_ROWS = 32


def integer_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` in exact integer arithmetic.

    Runs on ``torch._int_mm`` where that is exact and fast (CUDA; CPUs with VNNI or AMX), else on float32 matrix
    products of the codes in chunks of 1024 channels, whose sums stay within 2^24 and are therefore exact. Both
    give the same integers. CPUs that lack VNNI are kept off the integer path because its vector instructions
    saturate there (u8 x s8 pairs in int16), and so is a process whose int8 library was told to ignore VNNI.

    Args:
        a: int8 [M, K], any strides; M may be 0.
        b: int8 [N, K], any strides.

    Returns:
        int32 [M, N].

    Raises:
        NumericalError: the operands are not int8 matrices of one inner size, or K exceeds 131071 (int32 would
            overflow).
    """
    _check(a, b)
    if a.shape[1] >= _MIN_INNER and has_exact_int_mm(a.device.type):
        return _int_mm_padded(a, b) if a.is_cuda else _int_mm(a, b)
    return float_matmul(a, b)


def scaled_matmul(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor
) -> torch.Tensor:  # float32 [M, N]
    """``(a * a_scale) @ (b * b_scale).T``: the exact integer product, rounded once to float32, then scaled.

    Args:
        a: int8 [M, K].
        a_scale: float32 [M, 1].
        b: int8 [N, K].
        b_scale: float32 [N, 1].

    Raises:
        NumericalError: as ``integer_matmul``.
    """
    return integer_matmul(a, b).float().mul_(a_scale).mul_(b_scale.view(1, -1))


def float_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` of int8 codes [M, K] and [N, K] by float32 products: exact int32 [M, N] on any device."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for a_chunk, b_chunk in zip(a.split(FLOAT_CHUNK, dim=1), b.split(FLOAT_CHUNK, dim=1), strict=True):
        out += (a_chunk.float() @ b_chunk.float().t()).to(torch.int32)
    return out


@lru_cache(maxsize=8)
def has_exact_int_mm(device_type: str) -> bool:
    """Whether ``torch._int_mm`` is exact and accelerated on a device type; asked once per process."""
    if device_type == "cuda":
        return torch.version.cuda is not None
    if device_type != "cpu":
        return False
    return _cpu_has_int8_dot() and _survives_saturation()


def _cpu_has_int8_dot() -> bool:
    probes = ("_is_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def _survives_saturation() -> bool:
    """Multiply the largest codes: an int16 intermediate would saturate (a CPU may have VNNI and not use it)."""
    for num_rows, num_inner in ((1, 64), (32, 256)):
        a = torch.full((num_rows, num_inner), 127, dtype=torch.int8)
        b = torch.full((16, num_inner), 127, dtype=torch.int8)
        if not bool((_int_mm(a, b) == 127 * 127 * num_inner).all()):
            return False
    return True


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(a, b.t())  # pyright: ignore[reportPrivateImportUsage]


def _int_mm_padded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """CUDA wants more than 16 rows and sizes that are multiples of 8; zero padding changes no integer."""
    num_rows, num_inner = a.shape
    num_columns = b.shape[0]
    if 0 in (num_rows, num_inner, num_columns):
        return torch.zeros(num_rows, num_columns, dtype=torch.int32, device=a.device)
    inner_pad = -num_inner % _CUDA_MULTIPLE
    a = functional.pad(a, (0, inner_pad, 0, max(_CUDA_MIN_ROWS - num_rows, 0))).contiguous()
    b = functional.pad(b, (0, inner_pad, 0, -num_columns % _CUDA_MULTIPLE)).contiguous()
    return _int_mm(a, b)[:num_rows, :num_columns]


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise NumericalError(
            "both operands of an integer product must be int8",
            value=(a.dtype, b.dtype),
            remedy="use a symmetric format, or dequantize",
        )
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise NumericalError(
            "operands must be [M, K] and [N, K]",
            value=(tuple(a.shape), tuple(b.shape)),
            remedy="flatten leading dimensions",
        )
    if a.shape[1] > MAX_INNER:
        raise NumericalError(
            f"the inner size must be at most {MAX_INNER}, else int32 overflows",
            value=a.shape[1],
            remedy="split the product",
        )
