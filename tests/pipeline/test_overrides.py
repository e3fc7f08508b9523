"""Overrides of a scheme in the walk over the blocks: which linear gets what, with every kind of stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masq.compensation.config import WhitenedLowRank
from masq.models.base import Modality, Role
from masq.modules.footprint import footprint
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import Override, Scheme
from masq.pipeline import loop
from masq.pipeline.loop import QuantizationReport
from masq.pipeline.store import ALL_ROLES, BlockStore, block_tensors
from masq.rounding.config import ClipSearch, GptqRounding, NearestRounding
from masq.transforms.config import (
    AwqSmoothing,
    LearnedModalitySmoothing,
    LearnedSharedSmoothing,
    MbqSmoothing,
    SharedSmoothing,
)
from masq.transforms.frame import HadamardRotation
from tests.nano_fixtures import Nano, killed_after, make_nano, stages

MIXED = Scheme(
    "mixed",
    Scheme.preset("w4a6").weight,
    Scheme.preset("w4a6").activation,
    overrides=(
        Override(blocks=(0,), skip=True),
        Override(roles=("output",), skip=True),
        Override(roles=("down", "key"), weight_bits=8, activation_bits=8),
    ),
)
SLOTS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "smoothquant": {"smoothing": SharedSmoothing(groups=("qkv", "output", "gate_up", "down"))},
    "awq": {"smoothing": AwqSmoothing(steps=6), "rounding": NearestRounding(clip=ClipSearch())},
    "mbq_gptq": {"smoothing": MbqSmoothing(steps=6), "rounding": GptqRounding()},
    "quarot_gptq": {"rotation": HadamardRotation(), "rounding": GptqRounding(tokens="text")},
    "smoothquant_learned": {"smoothing": LearnedSharedSmoothing(epochs=1, groups=("gate_up", "output"))},
    "mas": {"smoothing": LearnedModalitySmoothing(epochs=1), "rounding": NearestRounding(per_modality=True)},
    "masquant": {
        "smoothing": LearnedModalitySmoothing(epochs=1),
        "compensation": WhitenedLowRank(rank_ratio=0.2, activations="float"),
    },
    "masquant_linear": {"smoothing": LearnedModalitySmoothing(epochs=1, objective="linear")},
    "low_rank": {"compensation": WhitenedLowRank(rank_ratio=0.2, groups=("output", "gate_up"))},
}


def quantize(nano: Nano, folder: Path, scheme: Scheme = MIXED, **slots: Any) -> QuantizationReport:
    stores = {name: BlockStore(folder / name) for name in ("blocks", "factors", "gradients")}
    return loop.quantize(nano.adapter, nano.batches, stages("rtn", scheme, **slots), nano.context, **stores)


def state(nano: Nano) -> dict[str, torch.Tensor]:
    return {f"{i}.{k}": v.clone() for i, b in enumerate(nano.adapter.blocks()) for k, v in block_tensors(b).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", list(SLOTS))
def test_every_linear_gets_what_it_was_given(tmp_path: Path, method: str) -> None:
    nano, floats = make_nano(num_samples=2), state(make_nano(num_samples=2))
    report = quantize(nano, tmp_path, **SLOTS[method])
    blocks = nano.adapter.blocks()
    if "rotation" not in SLOTS[method]:
        untouched = {key: value for key, value in state(nano).items() if key.startswith("0.")}
        assert same(untouched, {key: floats[key] for key in untouched}), "a skipped block keeps every bit, norms too"
        assert set(report.blocks[0]["sqnr"].values()) == {200.0}
    for block in blocks[1:]:
        for role in ALL_ROLES:
            layer = block.linear(role)
            assert isinstance(layer, torch.nn.Linear if role is Role.OUTPUT else QuantLinear)
            if isinstance(layer, QuantLinear):
                bits = (layer.weight_format.bits, layer.activation.bits)
                assert bits == ((8, 8) if role in (Role.DOWN, Role.KEY) else (4, 6))
    assert all(value > 0 for value in report.blocks[-1]["sqnr"].values())


@pytest.mark.parametrize("method", ["smoothquant", "awq", "masquant", "masquant_linear"])
@pytest.mark.parametrize("after", [1, 2])
def test_resume_is_bit_identical(tmp_path: Path, method: str, after: int) -> None:
    undisturbed, resumed = make_nano(num_samples=2), make_nano(num_samples=2)
    expected = quantize(undisturbed, tmp_path / "a", **SLOTS[method])
    with killed_after(after + 3 * SLOTS[method]["smoothing"].kind.endswith("learned")):
        quantize(make_nano(num_samples=2), tmp_path / "b", **SLOTS[method])
    report = quantize(resumed, tmp_path / "b", **SLOTS[method])
    assert same(state(resumed), state(undisturbed))
    assert report.blocks == expected.blocks


def test_more_bits_for_down_are_less_error(tmp_path: Path) -> None:
    base = replace(MIXED, overrides=())
    down = replace(MIXED, overrides=(Override(roles=("down",), weight_bits=8, activation_bits=8),))
    plain = quantize(make_nano(), tmp_path / "plain", base).blocks[-1]["sqnr"]
    better = quantize(make_nano(), tmp_path / "down", down).blocks[-1]["sqnr"]
    assert all(better[key] > plain[key] for key in plain)


def test_effective_bits_follow(tmp_path: Path) -> None:
    nano = make_nano(num_samples=2)
    shapes = {role: tuple(nano.adapter.blocks()[0].linear(role).weight.shape) for role in ALL_ROLES}
    quantize(nano, tmp_path)
    elements = {role: a * b for role, (a, b) in shapes.items()}
    quantized = {role: n for role, n in elements.items() if role is not Role.OUTPUT}
    codes = sum(n * (8 if role in (Role.DOWN, Role.KEY) else 4) for role, n in quantized.items())
    found = footprint(nano.adapter.blocks())
    assert found.num_weights == 3 * sum(elements.values())
    assert found.codes == 2 * (codes + 32 * elements[Role.OUTPUT]) + 32 * sum(elements.values())
    assert found.scales == 2 * 32 * sum(shapes[role][0] for role in quantized)


def test_a_group_with_two_activation_formats_learns_from_both(tmp_path: Path) -> None:
    """Key reads 8 bits where query and value read 6: one factor, two quantized inputs."""
    nano = make_nano(num_samples=2)
    report = quantize(nano, tmp_path, smoothing=LearnedModalitySmoothing(epochs=2, groups=("qkv",)))
    assert "initial_loss" not in report.blocks[0]
    assert all(block["final_loss"] < block["initial_loss"] for block in report.blocks[1:])
    tables = [nano.adapter.blocks()[1].linear(role).inverse_smoothing for role in (Role.QUERY, Role.KEY)]
    assert torch.equal(*tables)
    assert nano.adapter.blocks()[1].linear(Role.DOWN).inverse_smoothing is None
    assert not torch.equal(tables[0][int(Modality.TEXT)], tables[0][int(Modality.AUDIO)])
