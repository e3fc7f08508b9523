"""Matrix square roots and truncated singular value decompositions in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masq.errors import NumericalError

# Up to this smaller side a direct SVD costs no more than the route through the Gram matrix.
_DIRECT_SVD_SIDE = 64


@dataclass(frozen=True, eq=False)
class Whitener:
    """Symmetric square root T of a damped second moment: ``C + damping I = T T``.

    Attributes:
        sqrt: T, float64 [d, d].
        inverse_sqrt: T^-1, float64 [d, d].
        damping: absolute value that was added to every eigenvalue.
        min_eigenvalue: smallest eigenvalue of C before damping, as computed (may be slightly negative).
        max_eigenvalue: largest eigenvalue of C before damping.
    """

    sqrt: torch.Tensor
    inverse_sqrt: torch.Tensor
    damping: float
    min_eigenvalue: float
    max_eigenvalue: float


def whitener(covariance: torch.Tensor, damping: float) -> Whitener:
    """Factor a symmetric positive semidefinite matrix by its eigen-decomposition.

    Negative eigenvalues (rounding) count as zero. The all-zero matrix weighs every direction alike, so it gets T = I
    (reported as damping 1).

    Args:
        covariance: symmetric [d, d]; computed in float64.
        damping: added to every eigenvalue, relative to their mean; 0 is legal for a well-conditioned matrix.

    Raises:
        NumericalError: not square, not finite, not symmetric, negative damping, or singular after damping.
    """
    matrix = covariance.double()
    _check_covariance(matrix, damping)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    num_channels = matrix.shape[0]
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    added = damping * float(eigenvalues.mean()) if highest > 0 else 1.0
    roots = eigenvalues.clamp(min=0).add(added).sqrt()
    threshold = num_channels * torch.finfo(torch.float64).eps * highest
    if float(roots[0]) ** 2 <= threshold:
        raise NumericalError(
            "the second moment must be invertible after damping",
            value=f"smallest eigenvalue {lowest:.3g}, largest {highest:.3g}, damping {damping:g}",
            remedy="raise method.compensation.damping, or calibrate on more tokens than channels",
        )
    return Whitener(
        sqrt=(vectors * roots) @ vectors.t(),
        inverse_sqrt=(vectors / roots) @ vectors.t(),
        damping=added,
        min_eigenvalue=lowest,
        max_eigenvalue=highest,
    )


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets, ``matrix ~ U diag(S) Vh``.

    For a small rank: eigenvectors of the smaller Gram matrix span the leading subspace, and a singular value
    decomposition of the matrix restricted to it (Rayleigh-Ritz) gives triplets that are orthonormal and exact within
    it. Squaring costs accuracy only in the choice of the subspace: it captures the optimal energy sum(S^2) up to about
    min(m, n) * 2.2e-16 * S_1^2. Ranks above half of the smaller side, and small matrices, take the direct
    decomposition.

    Args:
        matrix: [m, n]; computed in float64.
        rank: 0 to min(m, n).

    Returns:
        U float64 [m, rank], S float64 [rank] descending, Vh float64 [rank, n].

    Raises:
        NumericalError: the rank is out of range or the matrix is not finite.
    """
    matrix = matrix.double()
    side = min(matrix.shape)
    if not 0 <= rank <= side:
        raise NumericalError(f"the rank must lie in 0..{side}", value=rank, remedy="lower the rank")
    _check_finite(matrix, "a matrix to decompose")
    if side <= _DIRECT_SVD_SIDE or 2 * rank > side:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    if matrix.shape[0] <= matrix.shape[1]:
        basis = _leading_eigenvectors(matrix @ matrix.t(), rank)
        u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
        return basis @ u, s, vh
    basis = _leading_eigenvectors(matrix.t() @ matrix, rank)
    u, s, vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return u, s, vh @ basis.t()


def _leading_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal [k, rank] spanning the eigenvectors of the largest eigenvalues."""
    return torch.linalg.eigh(gram).eigenvectors[:, gram.shape[0] - rank :]


def _check_covariance(matrix: torch.Tensor, damping: float) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise NumericalError("a second moment must be square", value=tuple(matrix.shape), remedy="pass [d, d]")
    _check_finite(matrix, "a second moment")
    if float((matrix - matrix.t()).abs().max()) > 1e-9 * float(matrix.abs().max()):
        raise NumericalError("a second moment must be symmetric", value="C != C^T", remedy="pass X^T X / N")
    if not 0 <= damping < float("inf"):
        raise NumericalError("damping must be at least 0 and finite", value=damping, remedy="set it to 1e-4")


def _check_finite(matrix: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError(f"{what} must be finite", value="NaN or infinity", remedy="check the layer that feeds it")
