"""Stored low-rank factors: as they are, or as int8 codes with one scale a component.

Shapes: I input channels, O output channels, R rank, n rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from typing import TypeAlias

QMAX = 127
"""Largest code of a factor; its negative is the smallest."""


class Factors(NamedTuple):
    """A correction ``L1 L2`` as it is stored.

    With a scale t, ``left`` and ``right`` are codes and stand for ``L1 = left diag(t)`` and ``L2 = diag(t) right``.
    A component can be scaled up in L1 and down in L2 without a change of their product: so that one t serves both, they
    are stored with the same largest magnitude.

    Attributes:
        left: L1 [I, R], or its codes, int8.
        right: L2 [R, O], or its codes, int8.
        scale: t, float32 [R], None where the factors are stored as they are.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: torch.Tensor | None = None

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """L1 and L2, float64 and exact."""
        left, right = self.left.double(), self.right.double()
        if self.scale is None:
            return left, right
        scale = self.scale.double()
        return left * scale, scale.unsqueeze(1) * right


Given: TypeAlias = "Factors | tuple[torch.Tensor, torch.Tensor]"
"""``Factors``, or L1 and L2 as they are."""


def factors_of(given: Given) -> Factors:
    """The same as ``Factors``."""
    return given if isinstance(given, Factors) else Factors(*given)


def store(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Factors of float64 in the dtype in which they are stored; int8 means codes and scales (see ``encode``)."""
    return encode(left, right) if dtype == torch.int8 else Factors(left.to(dtype), right.to(dtype))


def encode(left: torch.Tensor, right: torch.Tensor) -> Factors:
    """Round both factors to symmetric int8 codes with one common scale for each component.

    The scale of component r is ``t = sqrt(max |L1_r| max |L2_r|) / 127``, rounded to float32: that of both sides once
    they have the same largest magnitude. Balanced so, an element is off by at most t / 2. All else is in float64. Codes
    and scales that are taken apart (``Factors.dense``) and encoded again are the same.

    Args:
        left: L1, [I, R].
        right: L2, [R, O].

    Returns:
        Codes between -127 and 127. A component that is zero on one side, or below what float32 can hold, is zero. What
        is not finite has a scale that is not.
    """
    left, right = left.double(), right.double()
    most_left, most_right = left.abs().amax(0).sqrt(), right.abs().amax(1).sqrt()
    scale = (most_left * most_right / QMAX).float()
    step = scale.double()
    to_left = torch.where(step > 0, most_right / most_left / step, 0.0)
    to_right = torch.where(step > 0, most_left / most_right / step, 0.0)
    return Factors(_codes(left * to_left), _codes(to_right.unsqueeze(1) * right), scale)


def project(rows: torch.Tensor, left: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What L2, or its codes, is to be multiplied with: ``U = rows L1``, or ``rows L1 diag(t)`` where there are scales.

    L1 is brought to the dtype of the rows. Codes are exact in bfloat16, whose products with them cannot overflow; for
    other dtypes they are multiplied by their scales before. The scale of L2 goes to U, which is small; the codes of L2
    are exact in every dtype.

    Args:
        rows: [n, I].
        left: of ``Factors``, perhaps with columns of zeros (``PreparedFactors.widened``).
        scale: of ``Factors``, one for each column.

    Returns:
        [n, R] in the dtype of the rows.
    """
    if scale is None:
        return rows @ left.to(rows.dtype)
    if rows.dtype == torch.bfloat16:
        return (rows @ left.to(rows.dtype) * scale * scale).to(rows.dtype)
    u_nr = rows @ (left * scale).to(rows.dtype)
    return (u_nr * scale).to(rows.dtype)


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round().clamp(-QMAX, QMAX).to(torch.int8)
