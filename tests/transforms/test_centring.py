"""Centring: statistics as if the rows had been centred, an identity in float, and less to round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from masq.calibration.statistics import GroupAccumulator, GroupStatistics, TokenSample
from masq.errors import ConfigError
from masq.models.base import Modality
from masq.modules.centres import Centres
from masq.modules.modality import ModalityContext
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize
from masq.numerics.scheme import Scheme, TensorFormat
from masq.pipeline.group_input import GroupInput
from masq.transforms.centring import NOISE, centred
from masq.transforms.frame import ModalityCentring

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
IDS = torch.tensor([[-1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 0]], dtype=torch.int8)


def batch(num_channels: int = 13, seed: int = 0) -> torch.Tensor:
    """Rows [2, 7, D] that lie around a point of their modality."""
    generator = torch.Generator().manual_seed(seed)
    points = 4 * torch.randn(2, num_channels, generator=generator)
    return points[IDS.clamp(min=0).long()] + torch.randn(2, 7, num_channels, generator=generator)


def statistics(x: torch.Tensor, centre: bool) -> GroupStatistics:
    sample = TokenSample.draw([IDS, IDS], 5, 0)
    accumulator = GroupAccumulator(second_moment=True, sample=sample, centre=centre)
    accumulator.update(x, IDS)
    accumulator.update(2 * x, IDS)
    return accumulator.result()


def test_statistics_are_those_of_centred_rows() -> None:
    x = batch().double()
    found = centred({"qkv": statistics(x, centre=True)}, ["qkv"])["qkv"]
    assert set(found.centre) == {TEXT, VISION}
    points = torch.stack([found.centre[TEXT], found.centre[VISION]])[IDS.clamp(min=0).long()]
    sample = TokenSample.draw([IDS, IDS], 5, 0)
    accumulator = GroupAccumulator(second_moment=True, sample=sample)
    for scale in (1, 2):
        accumulator.update(scale * x - points, IDS)
    expected = accumulator.result()
    for m in (TEXT, VISION):
        assert torch.allclose(found.abs_max[m], expected.abs_max[m], rtol=1e-5)
        noise = NOISE * found.centre[m].square().mean() * torch.eye(13, dtype=torch.float64)
        assert torch.allclose(found.second_moment[m], expected.second_moment[m] + noise, rtol=1e-9, atol=1e-9)
        assert torch.equal(found.second_moment[m], found.second_moment[m].t())
        assert torch.allclose(found.rows[m], expected.rows[m], atol=1e-5)
        assert found.num_tokens[m] == expected.num_tokens[m]


def test_groups_that_are_left_out_stay_as_they_are() -> None:
    given = {"qkv": statistics(batch(), centre=True), "down": statistics(batch(), centre=False)}
    found = centred(given, ["qkv"])
    assert found["down"] is given["down"]
    assert found["qkv"] is not given["qkv"]


def test_a_modality_that_is_left_out_keeps_the_origin() -> None:
    given = statistics(batch(), centre=True)
    found = centred({"qkv": given}, ["qkv"], ["vision", "audio"])["qkv"]
    assert not found.centre[TEXT].any()
    assert torch.equal(found.centre[VISION], given.centre[VISION])
    assert torch.equal(found.second_moment[TEXT], given.second_moment[TEXT])
    assert torch.equal(found.abs_max[TEXT], given.abs_max[TEXT])
    assert torch.equal(found.rows[TEXT], given.rows[TEXT])


def test_the_centre_has_the_least_relative_distance_and_ignores_massive_tokens() -> None:
    x = batch(seed=1)
    x[0, 2] *= 1000
    found = statistics(x, centre=True)
    rows = torch.cat([x, 2 * x])[torch.cat([IDS, IDS]) == VISION].double()
    largest = rows.abs().amax(1)

    def loss(point: torch.Tensor) -> float:
        return float(((rows - point).square().sum(1) / largest.square()).mean())

    least, generator = loss(found.centre[VISION]), torch.Generator().manual_seed(2)
    for size in (1e-3, 0.1, 1.0):
        step = size * torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        assert loss(found.centre[VISION] + step) > least
    assert float((found.mean[VISION] - rows.mean(0)).norm()) < 1e-3 * float(rows.mean(0).norm())
    assert float(found.centre[VISION].norm()) < 0.2 * float(found.mean[VISION].norm())


def test_rows_of_zeros_have_no_say() -> None:
    x = torch.zeros_like(batch())
    found = statistics(x, centre=True)
    assert all(not one.any() for one in (*found.centre.values(), *found.mean.values()))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_exact_in_float(folded: bool, has_bias: bool) -> None:
    """A weight that its codes hold exactly, float activations: the layer is the float linear, for every modality."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(4)[:13]
    linear = nn.Linear(13, 5, bias=has_bias)
    codes = torch.randint(-100, 100, (5, 13), generator=generator)
    codes[:, 0] = 127
    linear.weight.data = (codes * 2.0**-6 / factor).float()
    x, context = batch(), ModalityContext()
    given = centred({"qkv": statistics(x, centre=True)}, ["qkv"])["qkv"]
    reads = GroupInput({TEXT: factor, VISION: factor}, folded, None, given)
    stored = quantize((linear.weight.detach().double() * factor).float(), TensorFormat(8, granularity="per_channel"))
    assert torch.equal(stored.dequantize(torch.float32), linear.weight * factor)
    bias = reads.centres(linear)
    assert isinstance(bias, Centres)
    layer = QuantLinear(
        weights={TEXT: stored}, bias=bias, activation=None, context=context, smoothing=None if folded else reads.factors
    )
    context.set(IDS)
    output = layer(x / factor if folded else x)
    rows = IDS >= 0
    assert torch.allclose(output[rows], linear(x)[rows], rtol=1e-4, atol=1e-4)
    audio = torch.where(rows, torch.tensor(2, dtype=torch.int8), IDS)
    context.set(audio)
    assert torch.allclose(layer(x / factor if folded else x)[rows], linear(x)[rows], rtol=1e-4, atol=1e-4)


def test_less_is_left_to_round() -> None:
    fmt = Scheme.preset("w4a4").formats["query"]
    generator = torch.Generator().manual_seed(4)
    linear, x, context = nn.Linear(13, 8, bias=False), batch(seed=5), ModalityContext()
    linear.weight.data = torch.randn(8, 13, generator=generator)
    context.set(IDS)
    errors = {}
    for centre in (False, True):
        given = statistics(x, centre=centre)
        reads = GroupInput({}, False, None, centred({"qkv": given}, ["qkv"] if centre else [])["qkv"])
        stored = {TEXT: quantize(linear.weight.detach(), fmt.weight)}
        layer = QuantLinear(weights=stored, bias=reads.centres(linear), activation=fmt.activation, context=context)
        errors[centre] = float((layer(x) - linear(x).detach())[IDS >= 0].norm())
    assert errors[True] < 0.5 * errors[False]


def test_a_group_is_named_once() -> None:
    with pytest.raises(ConfigError, match="each once"):
        ModalityCentring(groups=("qkv", "qkv"))
    with pytest.raises(ConfigError, match="at least one group"):
        ModalityCentring(groups=())
    with pytest.raises(ConfigError, match="at least one modality"):
        ModalityCentring(modalities=())
