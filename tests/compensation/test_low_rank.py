"""Theorem 2 (arXiv 2603.04800): the whitened low-rank fit is the exact minimiser, in the norm of the activations."""

import numpy as np
import pytest
import torch

from masq.compensation.config import WhitenedLowRank
from masq.compensation.low_rank import (
    LowRank,
    captured_share,
    fit_low_rank,
    fit_low_rank_from_covariance,
    resolve_rank,
    scaled_covariance,
)
from masq.errors import ConfigError, NumericalError
from masq.numerics.linalg import whitener
from masq.numerics.low_rank import encode

# (input channels, output channels): odd, tall, wide, one output, and large enough for the Gram route on both sides.
SHAPES = [(7, 5), (13, 29), (29, 13), (9, 1), (90, 141), (141, 90)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(num_channels: int, num_tokens: int | None = None, seed: int = 0) -> torch.Tensor:
    """Correlated rows with outlier channels, as in a language model."""
    rows = normal(num_tokens or 3 * num_channels, num_channels, seed=seed)
    mix = torch.eye(num_channels, dtype=torch.float64) + 0.3 * normal(num_channels, num_channels, seed=seed + 50)
    return rows @ mix * torch.logspace(1, -1, num_channels, dtype=torch.float64)


def moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.t() @ rows / rows.shape[0]


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations A [N, I] and a weight error dW [O, I]."""
    return activations(shape[0], seed=seed), normal(shape[1], shape[0], seed=seed + 1)


def loss(rows: torch.Tensor, residual: torch.Tensor, product: torch.Tensor) -> float:
    """||A (dW^T - L)||_F."""
    return float(torch.linalg.matrix_norm(rows @ (residual.t() - product)))


def product(fit: LowRank) -> torch.Tensor:
    return fit.left @ fit.right


def middle_rank(shape: tuple[int, int]) -> int:
    return max(1, min(shape) // 3)


@each_shape
@pytest.mark.parametrize("whiten", [True, False])
def test_what_any_factors_capture(shape: tuple[int, int], whiten: bool) -> None:
    """As the fit says of its own; of codes it is no more, and nothing of zeros."""
    rows, residual = problem(shape)
    root = whitener(moment(rows), 1e-4)
    fit = fit_low_rank(residual, root, middle_rank(shape), whiten=whiten)
    assert captured_share(residual, root, fit.left, fit.right) == pytest.approx(fit.captured, rel=1e-9)
    coded = captured_share(residual, root, *encode(fit.left, fit.right).dense())
    if whiten:
        assert coded < fit.captured
    zeros = captured_share(residual, root, 0 * fit.left, fit.right)
    assert zeros == 0
    assert captured_share(0 * residual, root, fit.left, fit.right) == 1


@each_shape
def test_equals_eckart_young_on_the_layer_output(shape: tuple[int, int]) -> None:
    """Independent reference: L = A^+ (A dW^T)_r, with the truncation of the output itself and a least-squares solve."""
    rows, residual = problem(shape)
    rank = middle_rank(shape)
    fit = fit_low_rank_from_covariance(residual, moment(rows), rank, damping=0.0)
    target = (rows @ residual.t()).numpy()
    u, s, vh = np.linalg.svd(target, full_matrices=False)
    solution = np.linalg.lstsq(rows.numpy(), (u[:, :rank] * s[:rank]) @ vh[:rank], rcond=None)[0]
    np.testing.assert_allclose(product(fit), solution, rtol=0, atol=1e-8 * np.abs(solution).max())
    assert loss(rows, residual, product(fit)) == pytest.approx(float(np.linalg.norm(s[rank:])), rel=1e-9, abs=1e-8)


@each_shape
def test_no_alternating_step_improves_it(shape: tuple[int, int]) -> None:
    """At the optimum, solving for one factor with the other fixed changes nothing; from a random start it ends here."""
    rows, residual = problem(shape)
    rank = middle_rank(shape)
    best = loss(rows, residual, product(fit_low_rank_from_covariance(residual, moment(rows), rank, 0.0)))
    right = normal(rank, shape[1], seed=77)
    for _ in range(300):
        left = torch.linalg.lstsq(right.t(), residual).solution.t()
        right = torch.linalg.lstsq(rows @ left, rows @ residual.t()).solution
    found = loss(rows, residual, left @ right)
    assert best <= found * (1 + 1e-9) + 1e-9
    assert found <= best * 1.05 + 1e-9


@each_shape
def test_beats_random_corrections_and_the_plain_svd(shape: tuple[int, int]) -> None:
    rows, residual = problem(shape)
    rank = middle_rank(shape)
    root = whitener(moment(rows), 0.0)
    best = loss(rows, residual, product(fit_low_rank(residual, root, rank)))
    plain = loss(rows, residual, product(fit_low_rank(residual, root, rank, whiten=False)))
    assert best <= plain + 1e-9
    if min(shape) > 1:
        assert best < 0.99 * plain
    for seed in range(20):
        left = normal(shape[0], rank, seed=100 + seed)
        # The best right factor for a random left one, which is far better than random on both sides.
        right = torch.linalg.lstsq(rows @ left, rows @ residual.t()).solution
        assert best <= loss(rows, residual, left @ right) + 1e-9


@each_shape
def test_small_changes_of_the_solution_do_not_help(shape: tuple[int, int]) -> None:
    rows, residual = problem(shape)
    fit = fit_low_rank_from_covariance(residual, moment(rows), middle_rank(shape), 0.0)
    best = loss(rows, residual, product(fit))
    for seed in range(20):
        left = fit.left + 1e-3 * normal(*fit.left.shape, seed=seed) * fit.left.abs().mean()
        right = fit.right + 1e-3 * normal(*fit.right.shape, seed=seed + 30) * fit.right.abs().mean()
        assert best <= loss(rows, residual, left @ right) + 1e-9


@each_shape
def test_monotone_in_the_rank_and_zero_at_full_rank(shape: tuple[int, int]) -> None:
    rows, residual = problem(shape)
    root = whitener(moment(rows), 0.0)
    full = min(shape)
    ranks = sorted({0, 1, full // 4, full // 2, full - 1, full})
    fits = [fit_low_rank(residual, root, rank) for rank in ranks]
    losses = [loss(rows, residual, product(fit)) for fit in fits]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 1e-9 * losses[0]
    torch.testing.assert_close(product(fits[-1]), residual.t(), rtol=0, atol=1e-9)
    captured = [fit.captured for fit in fits]
    assert captured[0] == 0.0
    assert captured[-1] == pytest.approx(1.0, abs=1e-12)
    for share, value in zip(captured, losses, strict=True):
        assert share == pytest.approx(1 - (value / losses[0]) ** 2, abs=1e-9)


@each_shape
def test_equal_factors_give_qera(shape: tuple[int, int]) -> None:
    """QERA-exact, arXiv 2410.06040, theorem 1: C = R^-1/2 SVD_k(R^1/2 (W - W~)), written out here with numpy."""
    raw, weight = problem(shape)
    factor = normal(shape[0], seed=9).abs() + 0.2
    rounded = (weight * factor * 2).round() / 2
    covariance = scaled_covariance(moment(raw), factor)
    rank = middle_rank(shape)
    mine = product(fit_low_rank_from_covariance(weight * factor - rounded, covariance, rank, damping=0.0))
    values, vectors = np.linalg.eigh(moment(raw / factor).numpy())
    root = (vectors * np.sqrt(values)) @ vectors.T
    u, s, vh = np.linalg.svd(root @ (weight * factor - rounded).numpy().T, full_matrices=False)
    qera = np.linalg.inv(root) @ ((u[:, :rank] * s[:rank]) @ vh[:rank])
    np.testing.assert_allclose(mine, qera, rtol=0, atol=1e-9 * np.abs(qera).max())


def test_scaled_covariance_is_the_moment_of_the_smoothed_rows() -> None:
    rows, factor = activations(9), normal(9, seed=4).abs() + 0.1
    symmetric = (moment(rows) + moment(rows).t()) / 2
    mine = scaled_covariance(symmetric, factor.float())
    torch.testing.assert_close(mine, moment(rows / factor.float().double()), rtol=1e-12, atol=1e-14)
    assert torch.equal(mine, mine.t())


def test_shared_root_gives_the_same_as_one_factorisation_per_linear() -> None:
    rows, residual = problem((13, 29))
    shared = fit_low_rank(residual, whitener(moment(rows), 1e-4), 4)
    alone = fit_low_rank_from_covariance(residual, moment(rows), 4, 1e-4)
    assert torch.equal(shared.left, alone.left)
    assert torch.equal(shared.right, alone.right)


@pytest.mark.parametrize("num_tokens", [1, 5, 39])
@pytest.mark.parametrize("shape", [(40, 17), (80, 100)])
def test_fewer_tokens_than_channels(shape: tuple[int, int], num_tokens: int) -> None:
    """A singular C: the damped problem has a finite solution that serves the seen tokens almost optimally."""
    rows, residual = activations(shape[0], num_tokens), normal(shape[1], shape[0], seed=1)
    with pytest.raises(NumericalError, match="damping"):
        fit_low_rank_from_covariance(residual, moment(rows), 3, damping=0.0)
    fit = fit_low_rank_from_covariance(residual, moment(rows), 3, damping=1e-6)
    assert torch.isfinite(fit.left).all()
    assert torch.isfinite(fit.right).all()
    outputs = torch.linalg.svdvals(rows @ residual.t())
    optimum = float(outputs[3:].square().sum().sqrt())
    assert loss(rows, residual, product(fit)) <= optimum + 2e-2 * float(outputs[0])


def test_damping_solves_the_documented_problem() -> None:
    """Minimiser of ||A (dW^T - L)||^2 / N + eps ||dW^T - L||^2: the same as appending sqrt(N eps) I to the rows."""
    rows, residual = activations(11, 6), normal(8, 11, seed=1)
    fit = fit_low_rank_from_covariance(residual, moment(rows), 3, damping=0.05)
    eps = 0.05 * float(moment(rows).trace()) / 11
    extended = torch.cat([rows, (6 * eps) ** 0.5 * torch.eye(11, dtype=torch.float64)])
    u, s, vh = torch.linalg.svd(extended @ residual.t(), full_matrices=False)
    solution = torch.linalg.lstsq(extended, (u[:, :3] * s[:3]) @ vh[:3]).solution
    torch.testing.assert_close(product(fit), solution, rtol=0, atol=1e-9)


def test_rank_zero_is_no_correction() -> None:
    rows, residual = problem((7, 5))
    fit = fit_low_rank_from_covariance(residual, moment(rows), 0, 1e-4)
    assert (fit.left.shape, fit.right.shape, fit.captured) == ((7, 0), (0, 5), 0.0)
    assert torch.equal(product(fit), torch.zeros(7, 5, dtype=torch.float64))


def test_no_error_needs_no_correction() -> None:
    rows, _ = problem((7, 5))
    for rank in (0, 3):
        fit = fit_low_rank_from_covariance(torch.zeros(5, 7), moment(rows), rank, 1e-4)
        assert fit.captured == 1.0
        assert not product(fit).any()


def test_unwhitened_share_is_measured_in_the_same_norm() -> None:
    rows, residual = problem((13, 29))
    root = whitener(moment(rows), 0.0)
    plain = fit_low_rank(residual, root, 4, whiten=False)
    expected = 1 - (loss(rows, residual, product(plain)) / loss(rows, residual, torch.zeros(13, 29))) ** 2
    assert plain.captured == pytest.approx(expected, abs=1e-9)
    assert plain.captured < fit_low_rank(residual, root, 4).captured


def test_inputs_are_not_mutated() -> None:
    rows, residual = problem((13, 29))
    covariance, kept = moment(rows), residual.clone()
    before = covariance.clone()
    fit_low_rank_from_covariance(residual, covariance, 4, 1e-4)
    scaled_covariance(covariance, torch.full((13,), 2.0))
    assert torch.equal(residual, kept)
    assert torch.equal(covariance, before)


@pytest.mark.parametrize("rank", [-1, 6])
def test_rank_out_of_range(rank: int) -> None:
    rows, residual = problem((7, 5))
    with pytest.raises(ConfigError, match=r"0\.\.5"):
        fit_low_rank_from_covariance(residual, moment(rows), rank, 1e-4)


def test_bad_residuals_are_refused() -> None:
    rows, residual = problem((7, 5))
    residual[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="finite"):
        fit_low_rank_from_covariance(residual, moment(rows), 2, 1e-4)
    with pytest.raises(NumericalError, match=r"\(5, 6\)"):
        fit_low_rank_from_covariance(torch.ones(5, 6), moment(rows), 2, 1e-4)


@pytest.mark.parametrize(
    ("config", "d_in", "d_out", "rank"),
    [
        (WhitenedLowRank(rank_ratio=0.05), 576, 1536, 28),
        (WhitenedLowRank(rank_ratio=0.05), 576, 192, 9),
        (WhitenedLowRank(rank_ratio=0.05), 576, 19, 0),
        (WhitenedLowRank(rank_ratio=0.29), 100, 100, 29),
        (WhitenedLowRank(rank_ratio=1.0), 7, 5, 5),
        (WhitenedLowRank(rank_ratio=0.0), 7, 5, 0),
        (WhitenedLowRank(rank_ratio=None, rank=5), 7, 5, 5),
        (WhitenedLowRank(rank_ratio=None, rank=0), 7, 5, 0),
    ],
)
def test_resolve_rank(config: WhitenedLowRank, d_in: int, d_out: int, rank: int) -> None:
    assert resolve_rank(config, d_in, d_out) == rank


def test_resolve_rank_above_full_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"5 x 7.*0\.\.5.*got: 6"):
        resolve_rank(WhitenedLowRank(rank_ratio=None, rank=6), 7, 5)
