"""What kernels that read memory by themselves would misread, refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from masq.errors import NumericalError

if TYPE_CHECKING:
    from masq.kernels.base import Norm, RowSmoothing, Selection

_ROW_DTYPES = torch.float32, torch.bfloat16, torch.float16


def check_rows(x: torch.Tensor, smoothing: RowSmoothing | None, take: Selection | None) -> None:
    """Refuse what a kernel that reads memory by itself would misread.

    Raises:
        NumericalError: rows or factors of another dtype, shape or layout, a selection of other rows.
    """
    check_selection(take, x)
    inverse, centre = (None, None) if smoothing is None else (smoothing.inverse, smoothing.centre)
    wrong = x.dim() != 2 or not x.is_contiguous() or x.dtype not in _ROW_DTYPES
    if inverse is not None:
        wrong |= inverse.dtype != torch.float32 or inverse.shape[1:] != x.shape[1:] or not inverse.is_contiguous()
    if centre is not None:
        wrong |= centre.dtype != torch.bfloat16 or centre.shape[1:] != x.shape[1:] or not centre.is_contiguous()
    if wrong:
        raise NumericalError(
            "rows must be a contiguous matrix in float32, bfloat16 or float16, with smoothing vectors of their length",
            value=f"{x.dtype} {tuple(x.shape)}, smoothing {_shape(inverse)}, centres {_shape(centre)}",
            remedy="call contiguous(), and pass float32 factors and bfloat16 centres",
        )


def check_norm(x: torch.Tensor, norm: Norm) -> None:
    """Refuse a norm of other rows than these.

    Raises:
        NumericalError: gamma of another dtype, shape or layout.
    """
    gamma = norm.gamma
    if gamma.shape != x.shape[1:] or not gamma.is_contiguous() or gamma.dtype not in _ROW_DTYPES:
        raise NumericalError(
            "a norm must have a contiguous gamma of the rows' length",
            value=f"rows {tuple(x.shape)}, gamma {gamma.dtype} {_shape(gamma)}",
            remedy="pass the weight of an RMSNorm, in float32, bfloat16 or float16",
        )


def check_selection(selected: Selection | None, x: torch.Tensor) -> None:
    """Refuse a selection among another number of rows, or on another device.

    Raises:
        NumericalError: it is.
    """
    if selected is None:
        return
    rows, places = selected.rows, selected.places
    wrong = (rows.dtype, places.dtype) != (torch.int64, torch.int32) or places.shape != x.shape[:1]
    wrong |= {rows.device, places.device} != {x.device}
    if wrong or rows.dim() != 1 or not (rows.is_contiguous() and places.is_contiguous()):
        raise NumericalError(
            "a selection must tell int64 numbers of rows, and an int32 place for every row there is, on their device",
            value=f"rows {rows.dtype} {_shape(rows)}, places {places.dtype} {_shape(places)} of {_shape(x)}",
            remedy="make it by Selection.of with the number of rows",
        )


def check_gate(gate: torch.Tensor, up: torch.Tensor, take: Selection | None) -> None:
    """Refuse two matrices that are not alike, or whose rows are not in one piece.

    Raises:
        NumericalError: they are, or the selection is of other rows.
    """
    check_selection(take, gate)
    alike = gate.dim() == 2 and (gate.shape, gate.dtype) == (up.shape, up.dtype) and gate.dtype in _ROW_DTYPES
    if not alike or (gate.shape[1] > 1 and (gate.stride(1), up.stride(1)) != (1, 1)):
        raise NumericalError(
            "gate and up must be matrices of one shape and dtype, their rows in one piece",
            value=f"{gate.dtype} {_shape(gate)} of strides {gate.stride()}, {up.dtype} {_shape(up)} of {up.stride()}",
            remedy="call contiguous(), and bring both to one dtype",
        )


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
