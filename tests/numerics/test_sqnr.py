"""SQNR by token."""

from __future__ import annotations

import torch

from masq.numerics.sqnr import CAP_DB, token_sqnr


def test_hand_computed() -> None:
    y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]])
    noisy = torch.tensor([[3.0, 3.5], [0.0, 0.0], [2.0, 2.0]])
    expected = torch.tensor([20.0, 0.0, CAP_DB], dtype=torch.float64)
    torch.testing.assert_close(token_sqnr(y, noisy), expected)


def test_extremes_stay_finite() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(token_sqnr(zero, one)) == -CAP_DB
    assert float(token_sqnr(zero, zero)) == CAP_DB


def test_a_failed_token_is_not_hidden() -> None:
    assert token_sqnr(torch.ones(1, 2), torch.tensor([[float("nan"), 1.0]])).isnan().all()
