from __future__ import annotations

import pytest
import torch

from masq.errors import ConfigError
from masq.numerics import hadamard, paley

# Hidden and intermediate sizes of SmolLM2-135M, Qwen2.5-3B and Qwen2.5-7B, and head sizes.
MODEL_SIZES = (64, 128, 576, 1536, 2048, 3584, 11008, 18944)


@pytest.mark.parametrize("order", [12, 20, 28, 36, 148, 344, 4, 8, 52, 100])
def test_dense_factors_are_hadamard(order: int) -> None:
    matrix = hadamard.paley_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 24, 64, 576, 1536])
def test_whole_matrix_is_hadamard_and_the_fast_form_applies_it(n: int) -> None:
    matrix = hadamard.hadamard_matrix(n)
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    signs = hadamard.random_signs(n, 0, "test")
    expected = (x * signs) @ matrix.t() / n**0.5
    torch.testing.assert_close(hadamard.rotate(x, signs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_rotation_keeps_products_at_model_sizes(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x, w = (torch.randn(rows, n, dtype=torch.float64, generator=generator) for rows in (4, 3))
    signs = hadamard.random_signs(n, 7, "residual")
    rotated = hadamard.rotate(x, signs)
    assert not torch.allclose(rotated, x)
    torch.testing.assert_close(rotated @ hadamard.rotate(w, signs).t(), x @ w.t(), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(hadamard.rotate_back(rotated, signs), x, rtol=1e-11, atol=1e-11)


def test_one_outlier_channel_is_spread_evenly() -> None:
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 17] = 24.0
    torch.testing.assert_close(hadamard.rotate(x).abs(), torch.ones_like(x), rtol=1e-12, atol=1e-12)


def test_signs_depend_on_every_part_of_their_key() -> None:
    signs = hadamard.random_signs(64, 0, "down", 3)
    assert torch.equal(signs, hadamard.random_signs(64, 0, "down", 3))
    assert set(signs.tolist()) == {-1.0, 1.0}
    for other in ((1, "down", 3), (0, "value", 3), (0, "down", 4)):
        assert not torch.equal(signs, hadamard.random_signs(64, *other))


@pytest.mark.parametrize("n", [0, 3, 6, 9, 92 * 7])
def test_sizes_without_a_matrix_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match="Hadamard"):
        paley.factor(n)


def test_dtype_is_kept() -> None:
    assert hadamard.rotate(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16
