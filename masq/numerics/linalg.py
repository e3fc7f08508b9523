"""Matrix square roots and truncated singular value decompositions in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from masq.errors import NumericalError
from masq.numerics.finite import is_finite

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


class Spectrum:
    """A symmetric positive semidefinite matrix whose eigen-decomposition is computed once, when it is first needed.

    Args:
        matrix: C, symmetric [d, d]; kept as float64.

    Attributes:
        matrix: C, float64 [d, d].

    Raises:
        NumericalError: not square, not finite or not symmetric.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix.double()
        _check_second_moment(self.matrix)

    @cached_property
    def _eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues [d], ascending, and eigenvectors [d, d] in columns."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    def root(self, damping: float) -> Whitener:
        """The square root of the damped matrix.

        Negative eigenvalues (rounding) count as zero. The all-zero matrix weighs every direction alike, so it gets
        T = I (reported as damping 1).

        Args:
            damping: added to every eigenvalue, relative to their mean; 0 is legal for a well-conditioned matrix.

        Raises:
            NumericalError: negative damping, or singular after damping.
        """
        _check_damping(damping)
        values, vectors = self._eigen
        lowest, highest = float(values[0]), float(values[-1])
        added = damping * float(values.mean()) if highest > 0 else 1.0
        roots = values.clamp(min=0).add(added).sqrt()
        if float(roots[0]) ** 2 <= len(values) * torch.finfo(torch.float64).eps * highest:
            raise _singular(f"smallest eigenvalue {lowest:.3g}, largest {highest:.3g}, damping {damping:g}")
        return Whitener(
            sqrt=(vectors * roots) @ vectors.t(),
            inverse_sqrt=(vectors / roots) @ vectors.t(),
            damping=added,
            min_eigenvalue=lowest,
            max_eigenvalue=highest,
        )

    def tail(self, rank: int) -> torch.Tensor:
        """The matrix without its ``rank`` strongest eigen-directions: float64 [d, d]; rank 0 leaves it as it is."""
        if rank == 0:
            return self.matrix
        values, vectors = self._eigen
        kept = values[: len(values) - rank].clamp(min=0)
        basis = vectors[:, : len(kept)]
        return (basis * kept) @ basis.t()


def whitener(covariance: torch.Tensor, damping: float) -> Whitener:
    """``Spectrum(covariance).root(damping)``."""
    return Spectrum(covariance).root(damping)


def damped_cholesky(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower triangular L of ``C + damping I = L L^T``: any square root will do where only norms count.

    Args:
        covariance: C, symmetric positive semidefinite [d, d].
        damping: relative to the mean eigenvalue; the all-zero matrix gives L = I, as for ``Spectrum.root``.

    Returns:
        float64 [d, d].

    Raises:
        NumericalError: negative damping, or singular after damping.
    """
    _check_damping(damping)
    matrix = covariance.double()
    mean = float(matrix.diagonal().mean())
    added = damping * mean if mean > 0 else 1.0
    factor, failed = torch.linalg.cholesky_ex(matrix + added * torch.eye(len(matrix), dtype=matrix.dtype).to(matrix))
    if int(failed):
        raise _singular(f"mean eigenvalue {mean:.3g}, damping {damping:g}")
    return factor


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


def _check_second_moment(matrix: torch.Tensor) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise NumericalError("a second moment must be square", value=tuple(matrix.shape), remedy="pass [d, d]")
    _check_finite(matrix, "a second moment")
    if float((matrix - matrix.t()).abs().max()) > 1e-9 * float(matrix.abs().max()):
        raise NumericalError("a second moment must be symmetric", value="C != C^T", remedy="pass X^T X / N")


def _check_damping(damping: float) -> None:
    if not 0 <= damping < float("inf"):
        raise NumericalError("damping must be at least 0 and finite", value=damping, remedy="set it to 1e-4")


def _singular(value: str) -> NumericalError:
    return NumericalError(
        "the second moment must be invertible after damping",
        value=value,
        remedy="raise method.compensation.damping, or calibrate on more tokens than channels",
    )


def _check_finite(matrix: torch.Tensor, what: str) -> None:
    if not is_finite(matrix):
        raise NumericalError(f"{what} must be finite", value="NaN or infinity", remedy="check the layer that feeds it")
