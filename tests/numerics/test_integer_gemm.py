"""The integer product is exact on every path, at the extremes and at odd sizes."""

from collections.abc import Iterator

import pytest
import torch

from masq.errors import NumericalError
from masq.numerics import integer_gemm
from masq.numerics.integer_gemm import (
    FLOAT_CHUNK,
    MAX_INNER,
    float_matmul,
    has_exact_int_mm,
    integer_matmul,
    scaled_matmul,
)

ROWS = (0, 1, 2, 15, 17, 127)
SIZES = ((1, 1), (7, 3), (33, 64), (5, 577), (3, 1025), (8, 4096))


@pytest.fixture(params=["chosen", "float"])
def multiply(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """integer_matmul as this machine chooses it, and as a CPU without int8 instructions would run it."""
    has_exact_int_mm.cache_clear()
    if request.param == "float":
        monkeypatch.setattr(integer_gemm, "_cpu_has_int8_dot", lambda: False)
        assert not has_exact_int_mm("cpu")
        monkeypatch.setattr(integer_gemm, "_int_mm", None)
    yield integer_matmul
    has_exact_int_mm.cache_clear()


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("num_columns", "num_inner"), SIZES)
def test_equals_int64_reference(multiply, num_rows: int, num_columns: int, num_inner: int) -> None:
    a, b = codes(num_rows, num_inner), codes(num_columns, num_inner, seed=1)
    out = multiply(a, b)
    assert out.dtype == torch.int32
    assert torch.equal(out.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("num_inner", [1, 255, 1024, 1025, 4096, 18944])
@pytest.mark.parametrize("num_rows", [1, 17])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (127, -127), (-127, -127), (-128, -128)])
def test_exact_at_the_extremes(multiply, num_inner: int, num_rows: int, left: int, right: int) -> None:
    a = torch.full((num_rows, num_inner), left, dtype=torch.int8)
    b = torch.full((9, num_inner), right, dtype=torch.int8)
    assert (multiply(a, b) == left * right * num_inner).all()


def test_strided_operands(multiply) -> None:
    a, b = codes(40, 90)[::2, ::3], codes(90, 14, seed=1).t()[::2, ::3]
    assert not a.is_contiguous()
    assert not b.is_contiguous()
    assert torch.equal(multiply(a, b).long(), a.long() @ b.long().t())


def test_both_paths_agree_bit_for_bit() -> None:
    a, b = codes(127, 3001), codes(65, 3001, seed=1)
    assert torch.equal(integer_matmul(a, b), float_matmul(a, b))


def test_float_chunk_is_provably_exact() -> None:
    assert FLOAT_CHUNK * 128 * 128 <= 2**24
    assert MAX_INNER * 128 * 128 < 2**31 <= (MAX_INNER + 1) * 128 * 128


def test_a_saturating_int8_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # What u8 x s8 multiplication does without VNNI: pairs are added in int16.
        pairs = ((a.int() + 128).unsqueeze(1) * b.int().unsqueeze(0)).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * b.int().sum(-1)

    monkeypatch.setattr(integer_gemm, "_cpu_has_int8_dot", lambda: True)
    monkeypatch.setattr(integer_gemm, "_int_mm", saturating)
    has_exact_int_mm.cache_clear()
    try:
        assert not has_exact_int_mm("cpu")
        a, b = codes(17, 64), codes(8, 64, seed=1)
        assert torch.equal(integer_matmul(a, b).long(), a.long() @ b.long().t())
    finally:
        has_exact_int_mm.cache_clear()


def test_unknown_devices_take_the_float_path() -> None:
    assert not has_exact_int_mm("mps")


@pytest.mark.parametrize("num_rows", [0, 1, 16, 33])
def test_padding_for_cuda_changes_nothing(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    def as_cuda_would(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[0] % 8 == 0
        return a.int() @ b.int().t()

    monkeypatch.setattr(integer_gemm, "_int_mm", as_cuda_would)
    a, b = codes(num_rows, 13), codes(5, 13, seed=1)
    out = integer_gemm._int_mm_padded(a, b)
    assert out.shape == (num_rows, 5)
    assert torch.equal(out.long(), a.long() @ b.long().t())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2, 3, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.int8)),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 2, dtype=torch.int8)),
        (torch.ones(1, 2, 3, dtype=torch.int8), torch.ones(2, 3, dtype=torch.int8)),
        (torch.ones(1, MAX_INNER + 1, dtype=torch.int8), torch.ones(1, MAX_INNER + 1, dtype=torch.int8)),
    ],
    ids=["float", "unsigned", "inner", "three_dimensions", "overflow"],
)
def test_bad_operands_are_refused(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(NumericalError):
        integer_matmul(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("num_columns", "num_inner"), SIZES)
def test_cuda_gives_the_integers_of_the_cpu(num_rows: int, num_columns: int, num_inner: int) -> None:
    a, b = codes(num_rows, num_inner), codes(num_columns, num_inner, seed=1)
    assert torch.equal(integer_matmul(a.cuda(), b.cuda()).cpu(), float_matmul(a, b))


def test_scaled_product_is_that_of_the_scaled_values() -> None:
    a, b = codes(5, 33), codes(7, 33, seed=1)
    a_scale, b_scale = torch.rand(5, 1) + 0.1, torch.rand(7, 1) + 0.1
    found = scaled_matmul(a, a_scale, b, b_scale)
    expected = (a.double() * a_scale.double()) @ (b.double() * b_scale.double()).t()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-6)
