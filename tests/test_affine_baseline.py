"""The learned affine baseline: an identity where nothing is rounded, and less error the longer it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from experiments.beyond import affine
from masq.calibration.replay import advance
from masq.numerics.scheme import LinearFormat, Scheme, TensorFormat
from masq.pipeline.fitting import Chain
from tests.nano_fixtures import Nano, nano_model  # noqa: F401


@pytest.mark.parametrize(("size", "sides"), [(576, (24, 24)), (1536, (32, 48)), (7, (1, 7)), (1, (1, 1))])
def test_sides_are_near_each_other(size: int, sides: tuple[int, int]) -> None:
    assert affine.factor_sides(size) == sides


@pytest.mark.parametrize("size", [12, 7])
def test_it_is_exact_in_float(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    source, linear = affine.AffineInput(size, generator), nn.Linear(size, 5)
    with torch.no_grad():
        source.first += 0.2 * torch.randn(source.first.shape, generator=generator)
        source.log_scale += torch.randn(size, generator=generator)
    x = torch.randn(2, 3, size, generator=generator)
    wide = affine.AffineLinear(linear, source, LinearFormat(TensorFormat(8), None))
    with torch.no_grad():
        exact, rows = linear(x), source(x.flatten(0, 1))
        found = rows @ source.weight(linear.weight).t() + linear.bias
        assert torch.allclose(found, exact.flatten(0, 1), atol=1e-4)
        assert float((wide(x) - exact).norm() / exact.norm()) < 0.05


def test_learning_lowers_the_error_of_a_block(nano_model: Nano) -> None:  # noqa: F811
    """One channel stands out behind each norm: what a transform is there for."""
    block = nano_model.adapter.blocks()[0]
    for group in ("qkv", "gate_up"):
        norm = block.norm(group)
        assert norm is not None
        norm.weight.data[3] *= 30
    chain = Chain(nano_model.hidden, nano_model.replay)
    targets = [advance(block, *pair, "block") for pair in zip(chain.hidden, chain.replay, strict=True)]
    copied = copy.deepcopy(block)
    parameters = affine.attach(copied, Scheme.preset("w4a4"), 0)
    first, last = affine.learn(copied, parameters, chain, targets, 24)
    assert last < 0.8 * first
    size = affine.stored_bits(parameters, {"total": 4.0, "num_weights": 1000})
    assert size["total"] > 4.0
