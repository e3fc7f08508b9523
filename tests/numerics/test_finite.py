from __future__ import annotations

import pytest
import torch

from masq.numerics.finite import is_finite

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [INF, -INF], [NAN, INF]])
def test_nothing_hides(dtype: torch.dtype, bad: list[float]) -> None:
    x = torch.randn(3, 4, 65).to(dtype)
    assert is_finite(x)
    x[1, 2, : len(bad)] = torch.tensor(bad, dtype=dtype)
    assert not is_finite(x)


def test_the_largest_values_are_finite() -> None:
    assert is_finite(torch.full((4, 4096), torch.finfo(torch.float32).max))
    assert is_finite(torch.full((4, 4096), -torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))


def test_rows_that_do_not_count() -> None:
    x = torch.zeros(2, 3, 5)
    x[0, 1, 2] = NAN
    rows = torch.ones(2, 3, dtype=torch.bool)
    assert not is_finite(x, rows)
    rows[0, 1] = False
    assert is_finite(x, rows)
    assert is_finite(torch.zeros(0, 5))
