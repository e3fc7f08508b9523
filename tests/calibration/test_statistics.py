"""Statistics by modality: equal to a float64 reference, blind to padding, independent of the batching."""

import pytest
import torch

from masq.calibration.statistics import GroupAccumulator, GroupStatistics
from masq.errors import ModelError, NumericalError
from masq.models.base import Modality

P, T, V, A = (int(m) for m in Modality)


def batch(seed: int, shape: tuple[int, ...] = (4, 9), num_channels: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, num_channels, generator=generator)
    return x, torch.randint(-1, 3, shape, dtype=torch.int8, generator=generator)


def collect(*batches: tuple[torch.Tensor, torch.Tensor], second_moment: bool = True) -> GroupStatistics:
    accumulator = GroupAccumulator(second_moment=second_moment)
    for x, modality in batches:
        accumulator.update(x, modality)
    return accumulator.result()


def assert_same(a: GroupStatistics, b: GroupStatistics, atol: float = 0.0) -> None:
    assert a.num_tokens == b.num_tokens
    assert a.abs_max.keys() == b.abs_max.keys()
    for which in a.abs_max:
        assert torch.equal(a.abs_max[which], b.abs_max[which])
        torch.testing.assert_close(a.second_moment[which], b.second_moment[which], rtol=0, atol=atol)


def test_equals_the_definition() -> None:
    batches = [batch(0), batch(1)]
    stats = collect(*batches)
    rows = torch.cat([x.reshape(-1, 7) for x, _ in batches]).double()
    kinds = torch.cat([m.reshape(-1) for _, m in batches])
    assert list(stats.abs_max) == [Modality.TEXT, Modality.VISION, Modality.AUDIO]
    for which, abs_max in stats.abs_max.items():
        own = rows[kinds == int(which)]
        assert stats.num_tokens[which] == own.shape[0]
        assert torch.equal(abs_max, own.abs().amax(0).float())
        expected = sum(torch.outer(row, row) for row in own) / own.shape[0]
        torch.testing.assert_close(stats.second_moment[which], expected, rtol=1e-13, atol=1e-14)
        assert stats.second_moment[which].dtype == torch.float64
        assert abs_max.dtype == torch.float32


def test_padding_touches_nothing() -> None:
    x, modality = batch(2)
    clean = collect((x, modality))
    dirty = x.clone()
    dirty[modality == P] = float("nan")
    assert_same(collect((dirty, modality)), clean)
    assert collect((x, torch.full_like(modality, P))).num_tokens == {}


def test_an_absent_modality_has_no_key() -> None:
    x, modality = batch(3)
    modality[modality == A] = T
    stats = collect((x, modality))
    assert Modality.AUDIO not in stats.abs_max
    assert Modality.AUDIO not in stats.second_moment
    assert Modality.PADDING not in stats.num_tokens


def test_repeating_the_updates_gives_the_same_bits() -> None:
    batches = [batch(seed) for seed in range(4)]
    assert_same(collect(*batches), collect(*batches))


def test_order_and_batching_matter_only_in_the_last_bits() -> None:
    batches = [batch(seed) for seed in range(4)]
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert_same(collect(*batches), collect(*reversed(batches)), atol=1e-14)
    assert_same(collect(*batches), collect(joined), atol=1e-14)


def test_long_batches_are_summed_in_chunks() -> None:
    x = torch.randn(9001, 3, generator=torch.Generator().manual_seed(0))
    stats = collect((x, torch.full((9001,), V, dtype=torch.int8)))
    exact = x.double().t() @ x.double() / 9001
    torch.testing.assert_close(stats.second_moment[Modality.VISION], exact, rtol=1e-13, atol=1e-15)
    assert stats.num_tokens == {Modality.VISION: 9001}


def test_float64_sums_survive_a_large_offset() -> None:
    """In float32 the sum of squares of 1e4 would swallow the variation of 1."""
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    stats = collect((x, torch.zeros(2000, dtype=torch.int8)))
    centred = stats.second_moment[Modality.TEXT] - torch.outer(x.double().mean(0), x.double().mean(0))
    variance = x.double().var(0, unbiased=False)
    torch.testing.assert_close(centred.diagonal(), variance, rtol=1e-5, atol=0)


def test_second_moment_is_symmetric_and_optional() -> None:
    x, modality = batch(5, num_channels=33)
    moment = collect((x, modality)).second_moment[Modality.TEXT]
    assert torch.equal(moment, moment.t())
    stats = collect((x, modality), second_moment=False)
    assert stats.second_moment == {}
    assert set(stats.abs_max) == set(stats.num_tokens)


def test_result_is_a_snapshot() -> None:
    accumulator = GroupAccumulator(second_moment=True)
    accumulator.update(*batch(6))
    first = accumulator.result()
    kept = {which: value.clone() for which, value in first.abs_max.items()}
    x, modality = batch(7)
    accumulator.update(x * 100, modality)
    assert all(torch.equal(first.abs_max[which], kept[which]) for which in kept)
    assert accumulator.result().num_tokens[Modality.TEXT] > first.num_tokens[Modality.TEXT]


def test_sixteen_bit_and_flat_inputs() -> None:
    x, modality = batch(8)
    flat = collect((x.reshape(-1, 7).bfloat16(), modality.reshape(-1)))
    assert_same(flat, collect((x.bfloat16().float(), modality)))


def test_inputs_stay_as_they_were_and_need_no_gradient() -> None:
    x, modality = batch(9)
    kept = x.clone()
    stats = collect((x.requires_grad_(), modality))
    assert torch.equal(x, kept)
    assert not stats.second_moment[Modality.TEXT].requires_grad


def test_bad_numbers_name_the_modality() -> None:
    x, modality = batch(10)
    modality[0, 0] = V
    x[0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="vision"):
        collect((x, modality))


def test_shape_mismatch_and_unknown_modality() -> None:
    x, modality = batch(11)
    with pytest.raises(ModelError, match=r"\(4, 8\)"):
        collect((x, modality[:, :8]))
    with pytest.raises(ModelError, match="got: 7"):
        collect((x, modality.fill_(7)))
