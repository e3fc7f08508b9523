"""Whitened low-rank correction of a weight error (cross-modal compensation).

MASQuant, arXiv 2603.04800, theorem 2; for one modality the same as QERA-exact, arXiv 2410.06040, theorem 1.
Shapes: I input channels, O output channels, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import ConfigError, NumericalError
from masq.numerics.linalg import Whitener, truncated_svd, whitener

if TYPE_CHECKING:
    from masq.compensation.config import WhitenedLowRank


@dataclass(frozen=True, eq=False)
class LowRank:
    """A correction ``y += (x / s_m) left right`` of the tokens of one modality.

    Attributes:
        left: L1, float64 [I, R].
        right: L2, float64 [R, O].
        captured: share of the whitened energy ``||T dW^T||_F^2`` that the correction removes, 1 if there was none
            to remove. Between 0 and 1 for the whitened fit; the unwhitened one can fall below 0.
    """

    left: torch.Tensor
    right: torch.Tensor
    captured: float


def resolve_rank(config: WhitenedLowRank, d_in: int, d_out: int) -> int:
    """Rank for a linear: ``rank`` as given, or ``int(rank_ratio * min(d_in, d_out))`` with no floor (0: no correction).

    Raises:
        ConfigError: the rank is above min(d_in, d_out).
    """
    # The tolerance keeps 0.29 * 100 = 28.999999999999996 at 29.
    rank = config.rank if config.rank is not None else int((config.rank_ratio or 0.0) * min(d_in, d_out) + 1e-9)
    _check_rank(rank, d_in, d_out)
    return rank


def scaled_covariance(second_moment: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Second moment of the smoothed rows x / s: ``C = S^-1 H S^-1``.

    Args:
        second_moment: H, [I, I].
        factor: s, [I].

    Returns:
        float64 [I, I], exactly symmetric if H is.
    """
    inverse = factor.double().reciprocal()
    return second_moment.double() * torch.outer(inverse, inverse)


def fit_low_rank(residual: torch.Tensor, root: Whitener, rank: int, *, whiten: bool = True) -> LowRank:
    """Best rank-R fit of a weight error in the norm of the activations.

    Minimises ``||A (dW^T - L)||_F^2 / N + damping ||dW^T - L||_F^2`` over rank-R L. With
    ``A^T A / N + damping I = T T`` and ``T dW^T = U S V^T`` the solution is ``L1 = T^-1 U_R``, ``L2 = S_R V_R^T``
    (Eckart-Young in the whitened space). Everything in float64. Linears that read the same input share ``root``.

    Args:
        residual: dW = W s_m - W_hat, [O, I].
        root: square root of the damped second moment of the smoothed rows, [I, I].
        rank: 0 to min(I, O).
        whiten: False takes the plain singular value decomposition of dW^T (the ablation without theorem 2).

    Raises:
        ConfigError: the rank is out of range.
        NumericalError: the residual is not finite or does not fit the root.
    """
    _check(residual, root, rank)
    error_io = residual.double().t()
    whitened_io = root.sqrt @ error_io
    energy = float(whitened_io.square().sum())
    u, s, vh = truncated_svd(whitened_io if whiten else error_io, rank)
    right = s.unsqueeze(1) * vh
    if whiten:
        # U and V are orthonormal and U S V^T is a projection of the target, so the energies subtract.
        return LowRank(root.inverse_sqrt @ u, right, _share(energy, energy - float(s.square().sum())))
    remaining = float((whitened_io - (root.sqrt @ u) @ right).square().sum())
    return LowRank(u, right, _share(energy, remaining))


def captured_share(residual: torch.Tensor, root: Whitener, left: torch.Tensor, right: torch.Tensor) -> float:
    """Share of the whitened energy that any factors remove: ``LowRank.captured`` of rounded ones.

    Args:
        residual: dW, [O, I].
        root: as for ``fit_low_rank``.
        left: L1, float64 [I, R].
        right: L2, float64 [R, O].
    """
    whitened_io = root.sqrt @ residual.double().t()
    remaining = float((whitened_io - (root.sqrt @ left) @ right).square().sum())
    return _share(float(whitened_io.square().sum()), remaining)


def fit_low_rank_from_covariance(
    residual: torch.Tensor, covariance: torch.Tensor, rank: int, damping: float, *, whiten: bool = True
) -> LowRank:
    """``fit_low_rank`` for a single linear.

    Args:
        residual: dW, [O, I].
        covariance: C_m = A_m^T A_m / N_m, [I, I]; may be singular if ``damping`` is positive.
        rank: 0 to min(I, O).
        damping: relative to the mean eigenvalue of C_m.
        whiten: see ``fit_low_rank``.
    """
    return fit_low_rank(residual, whitener(covariance, damping), rank, whiten=whiten)


def _share(energy: float, remaining: float) -> float:
    return 1.0 if energy == 0.0 else 1.0 - remaining / energy


def _check(residual: torch.Tensor, root: Whitener, rank: int) -> None:
    if residual.dim() != 2 or residual.shape[1] != root.sqrt.shape[0]:
        raise NumericalError(
            "a weight error must be [out, in] with the input channels of its second moment",
            value=(tuple(residual.shape), tuple(root.sqrt.shape)),
            remedy="pass the second moment of the input of this linear",
        )
    _check_rank(rank, residual.shape[1], residual.shape[0])


def _check_rank(rank: int, d_in: int, d_out: int) -> None:
    full = min(d_in, d_out)
    if not 0 <= rank <= full:
        raise ConfigError(
            f"the rank of a correction of a {d_out} x {d_in} weight must lie in 0..{full}",
            value=rank,
            remedy="lower method.compensation.rank, or use method.compensation.rank_ratio between 0 and 1",
        )
