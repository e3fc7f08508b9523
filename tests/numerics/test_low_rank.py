"""Codes of low-rank factors: laws of rounding, exact round trips, and what is multiplied."""

from __future__ import annotations

import math

import pytest
import torch

from masq.numerics.low_rank import QMAX, Factors, encode, factors_of, project, store

SIZES = [(1, 1, 1), (21, 3, 5), (64, 32, 33), (129, 7, 1), (5, 0, 9)]


def pair(d_in: int, rank: int, d_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors like those of a fit: float64, components of very different sizes, the second factor carrying them."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d_in, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d_out, generator=generator, dtype=torch.float64)
    return left / 9, right * torch.logspace(1, -5, max(rank, 1), dtype=torch.float64)[:rank, None]


def balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, both sides of a component with one largest magnitude."""
    ratio = (right.abs().amax(1) / left.abs().amax(0)).sqrt()
    return left * ratio, right / ratio.unsqueeze(1)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_types_and_range(size: tuple[int, int, int]) -> None:
    d_in, rank, d_out = size
    found = encode(*pair(*size))
    assert found.scale is not None
    assert (found.left.dtype, found.right.dtype, found.scale.dtype) == (torch.int8, torch.int8, torch.float32)
    assert (found.left.shape, found.right.shape, found.scale.shape) == ((d_in, rank), (rank, d_out), (rank,))
    # Every component uses the whole range on both sides.
    assert (found.left.short().abs().amax(0) == QMAX).all()
    assert (found.right.short().abs().amax(1) == QMAX).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_come_back(size: tuple[int, int, int]) -> None:
    first = encode(*pair(*size))
    again = encode(*first.dense())
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    # However the product is shared out between the factors.
    left, right = first.dense()
    apart = encode(left * 1024, right / 1024)
    assert all(torch.equal(one, other) for one, other in zip(first, apart, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_element_is_off_by_half_a_step(size: tuple[int, int, int]) -> None:
    """Half a step of the stored scale; what float32 takes of the scale moves an element by up to 127 2^-24 steps."""
    left, right = balanced(*pair(*size))
    found = encode(left, right)
    assert found.scale is not None
    half = found.scale.double() * (0.5 + QMAX * 2**-24)
    dense_left, dense_right = found.dense()
    assert ((dense_left - left).abs() <= half).all()
    assert ((dense_right - right).abs() <= half.unsqueeze(1)).all()


@pytest.mark.parametrize("size", [(64, 32, 33), (512, 16, 768), (1536, 8, 256)], ids=str)
def test_the_product_is_off_by_little(size: tuple[int, int, int]) -> None:
    """Rounding error t^2 / 12 an element against t^2 (127 / c)^2, c the ratio of largest to root mean square of a side.

    A component with crests c, c' is off by sqrt(c^2 + c'^2) / (127 sqrt(12)) of its norm; errors of components are
    independent of each other, and of the components, so that their squares add up. A tenth is left for chance.
    """
    left, right = pair(*size)
    found = encode(left, right)
    dense_left, dense_right = found.dense()
    crest = [top / side.square().mean(dim).sqrt() for side, dim, top in tops(left, right)]
    norms = (left.norm(dim=0) * right.norm(dim=1)).square()
    bound = (norms * (crest[0].square() + crest[1].square())).sum().sqrt() / (QMAX * math.sqrt(12))
    error = (dense_left @ dense_right - left @ right).norm()
    assert error <= 1.1 * bound
    assert error <= 0.016 * (left @ right).norm()


def tops(left: torch.Tensor, right: torch.Tensor) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    return [(left, 0, left.abs().amax(0)), (right, 1, right.abs().amax(1))]


def test_one_scale_serves_both_sides_of_any_size() -> None:
    """A component is as exact however its factors share out their norm."""
    left, right = pair(40, 4, 30)
    wanted = encode(left, right)
    for power in (-60, 60):
        found = encode(left * 2.0**power, right * 2.0**-power)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_components_that_are_not_there() -> None:
    left, right = pair(6, 4, 5)
    left[:, 0], right[1] = 0, 0
    left[:, 2], right[2] = left[:, 2] * 1e-60, right[2] * 1e-60
    found = encode(left, right)
    assert found.scale is not None
    assert found.scale[:3].tolist() == [0, 0, 0]
    assert not found.left[:, :3].any()
    assert not found.right[:3].any()
    assert found.left[:, 3].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_what_is_not_finite_shows_in_the_scale(value: float) -> None:
    left, right = pair(6, 2, 5)
    left[3, 1], right[1] = value, right[1] * 1e3
    scale = encode(left, right).scale
    assert scale is not None
    assert scale.isfinite().tolist() == [True, False]


def test_bytes_at_twice_the_rank() -> None:
    def num_bytes(factors: Factors) -> int:
        return sum(one.numel() * one.element_size() for one in factors if one is not None)

    for d_in, rank, d_out in SIZES:
        sixteen = num_bytes(store(*pair(d_in, rank, d_out), torch.bfloat16))
        assert num_bytes(store(*pair(d_in, 2 * rank, d_out), torch.int8)) == sixteen + 4 * 2 * rank


def test_other_dtypes_are_casts() -> None:
    left, right = pair(6, 2, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = store(left, right, dtype)
        assert torch.equal(found.left, left.to(dtype))
        assert torch.equal(found.right, right.to(dtype))
        assert found.scale is None
        assert torch.equal(found.dense()[0], left.to(dtype).double())
    assert factors_of((left, right)) == Factors(left, right)
    assert factors_of(found) is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_multiplied(dtype: torch.dtype) -> None:
    """U times the codes of L2 is the correction, as exact as the dtype has it; in float16 also where sums are large."""
    coded = encode(*pair(700, 6, 50))
    rows = (torch.randn(9, 700, generator=torch.Generator().manual_seed(3)) * 40).to(dtype)
    u = project(rows, coded.left, coded.scale)
    assert u.dtype == dtype
    left, right = coded.dense()
    wanted = rows.double() @ left @ right
    found = (u @ coded.right.to(dtype)).double()
    assert (found - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()
    # Codes are exact in every dtype that rows may have.
    assert torch.equal(coded.right.to(dtype).char(), coded.right)
    plain = store(*pair(700, 6, 50), torch.bfloat16)
    assert torch.equal(project(rows, plain.left, None), rows @ plain.left.to(dtype))
