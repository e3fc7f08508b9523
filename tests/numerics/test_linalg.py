"""Whitening squares back to the matrix; the truncated decomposition is the optimal one."""

import numpy as np
import pytest
import torch

from masq.errors import NumericalError
from masq.numerics.linalg import truncated_svd, whitener


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(num_channels: int, num_tokens: int, decay: float = 0.0) -> torch.Tensor:
    x = normal(num_tokens, num_channels) * torch.logspace(0, -decay, num_channels, dtype=torch.float64)
    return x.t() @ x / num_tokens


@pytest.mark.parametrize(("num_channels", "num_tokens", "damping"), [(7, 50, 0.0), (33, 100, 1e-4), (40, 9, 1e-4)])
def test_whitener_squares_to_the_damped_matrix(num_channels: int, num_tokens: int, damping: float) -> None:
    matrix = moment(num_channels, num_tokens, decay=2.0)
    root = whitener(matrix, damping)
    identity = torch.eye(num_channels, dtype=torch.float64)
    assert root.damping == pytest.approx(damping * float(matrix.trace()) / num_channels)
    torch.testing.assert_close(root.sqrt @ root.sqrt, matrix + root.damping * identity, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(root.sqrt @ root.inverse_sqrt, identity, rtol=0, atol=1e-10)
    assert torch.allclose(root.sqrt, root.sqrt.t(), atol=1e-14)


def test_whitener_reports_the_spectrum() -> None:
    root = whitener(torch.diag(torch.tensor([4.0, 9.0, 1.0])), 0.0)
    assert (root.min_eigenvalue, root.max_eigenvalue) == (pytest.approx(1.0), pytest.approx(9.0))
    assert torch.allclose(root.sqrt, torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)))


def test_zero_matrix_weighs_every_direction_alike() -> None:
    root = whitener(torch.zeros(4, 4), 1e-4)
    assert root.damping == 1.0
    assert torch.equal(root.sqrt, torch.eye(4, dtype=torch.float64))


def test_singular_matrix_needs_damping() -> None:
    singular = moment(12, 5)
    with pytest.raises(NumericalError, match="damping"):
        whitener(singular, 0.0)
    assert torch.isfinite(whitener(singular, 1e-4).inverse_sqrt).all()


@pytest.mark.parametrize(
    ("matrix", "damping"),
    [
        (torch.ones(2, 3), 0.1),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), 0.1),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 0.1),
        (torch.eye(2), -0.1),
        (torch.eye(2), float("nan")),
    ],
    ids=["shape", "nan", "asymmetric", "negative_damping", "nan_damping"],
)
def test_bad_matrices_are_refused(matrix: torch.Tensor, damping: float) -> None:
    with pytest.raises(NumericalError):
        whitener(matrix, damping)


SHAPES = [(5, 9), (9, 5), (1, 6), (70, 131), (131, 70), (96, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
def test_truncated_svd_equals_numpy(shape: tuple[int, int], share: float) -> None:
    matrix = normal(*shape)
    rank = max(1, int(share * min(shape)))
    u, s, vh = truncated_svd(matrix, rank)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    full_u, full_s, full_vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    best = (full_u[:, :rank] * full_s[:rank]) @ full_vh[:rank]
    np.testing.assert_allclose(s, full_s[:rank], rtol=1e-12)
    np.testing.assert_allclose((u * s) @ vh, best, atol=1e-9)
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(u.t() @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.t(), identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(80, 150), (150, 80)])
def test_gram_route_keeps_small_singular_values(shape: tuple[int, int]) -> None:
    """Rayleigh-Ritz restores the values that squaring would round to sqrt(eps)."""
    side = min(shape)
    u, _ = torch.linalg.qr(normal(shape[0], side))
    v, _ = torch.linalg.qr(normal(shape[1], side, seed=1))
    s = torch.logspace(0, -16, side, dtype=torch.float64)
    found = truncated_svd((u * s) @ v.t(), 30)[1]
    torch.testing.assert_close(found, s[:30], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(80, 150), (150, 80)])
def test_rank_deficient_matrices(shape: tuple[int, int]) -> None:
    matrix = normal(shape[0], 4) @ normal(4, shape[1], seed=1)
    u, s, vh = truncated_svd(matrix, 9)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-10)
    assert float(s[4]) < 1e-10 * float(s[0])
    torch.testing.assert_close(u.t() @ u, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    u, s, vh = truncated_svd(torch.zeros(*shape), 9)
    assert float((u * s @ vh).abs().max()) == 0.0


def test_rank_zero_and_rank_out_of_range() -> None:
    u, s, vh = truncated_svd(normal(80, 100), 0)
    assert (u.shape, s.shape, vh.shape) == ((80, 0), (0,), (0, 100))
    for rank in (-1, 6):
        with pytest.raises(NumericalError, match=r"0\.\.5"):
            truncated_svd(normal(5, 9), rank)
    with pytest.raises(NumericalError, match="finite"):
        truncated_svd(torch.full((2, 2), float("inf")), 1)
