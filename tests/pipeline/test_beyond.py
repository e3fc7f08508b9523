"""Stages beyond the paper in the walk over the blocks: exact in float, resumed to the bit, within their bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masq.compensation.config import NoCompensation, WhitenedLowRank
from masq.errors import ConfigError, ModelError
from masq.models.base import Modality, Role
from masq.modules.footprint import footprint
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.numerics.affine import quantize as quantize_tensor
from masq.numerics.hadamard import random_signs, rotate
from masq.numerics.scheme import Scheme
from masq.pipeline import loop
from masq.pipeline.store import ALL_ROLES, BlockStore, block_tensors
from masq.rounding.config import ClipSearch, GptqRounding, NearestRounding
from masq.transforms.config import ConvexModalitySmoothing, ModalitySmoothing, NoSmoothing, SharedSmoothing
from masq.transforms.frame import HadamardRotation, ModalityCentring, NoRotation, SmoothedHadamardRotation
from tests.nano_fixtures import Nano, killed_after, make_nano, nano_model, stages  # noqa: F401

REMAINDER = GptqRounding(tokens="remainder", share="signal", clip=ClipSearch(steps=4))
FILLED = WhitenedLowRank(rank_ratio=0.1, gauge="searched", ranks="filled")
CONVEX = ConvexModalitySmoothing(tokens=64, steps=30)
ARMS = {
    "masq": {"smoothing": CONVEX, "rounding": REMAINDER, "compensation": FILLED},
    "masq_rot": {"rotation": HadamardRotation(), "rounding": REMAINDER, "compensation": FILLED},
    "rounded": {
        "rotation": HadamardRotation(),
        "centring": ModalityCentring(),
        "rounding": replace(REMAINDER, inputs="rounded"),
        "compensation": FILLED,
    },
    "centred": {"centring": ModalityCentring(), "smoothing": CONVEX, "rounding": REMAINDER, "compensation": FILLED},
    "behind_smoothing": {
        "rotation": SmoothedHadamardRotation(),
        "smoothing": CONVEX,
        "rounding": REMAINDER,
        "compensation": FILLED,
    },
}


def run(nano: Nano, folder: Path, arm: str, scheme: str = "w4a6", **changes):
    stores = {"blocks": BlockStore(folder / "blocks"), "factors": BlockStore(folder / "factors")}
    made = stages("rtn", scheme, **{**ARMS[arm], **changes})
    return loop.quantize(nano.adapter, nano.batches, made, nano.context, **stores)


def state(nano: Nano) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": value.clone()
        for index, block in enumerate(nano.adapter.blocks())
        for key, value in block_tensors(block).items()
    }


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_runs_and_resumes_to_the_bit(tmp_path: Path, arm: str) -> None:
    whole = make_nano(num_samples=2)
    report = run(whole, tmp_path / "whole", arm)
    for block in report.blocks:
        assert all(0 < value < 80 for value in block["sqnr"].values())
        assert ("gauge" in block) == (arm not in ("masq_rot", "rounded"))
        assert set(block["ranks"]) == {role.value for role in ALL_ROLES}
    with killed_after(1):
        run(make_nano(num_samples=2), tmp_path / "killed", arm)
    resumed = make_nano(num_samples=2)
    run(resumed, tmp_path / "killed", arm)
    one, two = state(whole), state(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_filled_ranks_keep_to_the_bytes_of_equal_ones(tmp_path: Path) -> None:
    bytes_of = {}
    for ranks in ("equal", "filled"):
        nano = make_nano(num_samples=2)
        run(nano, tmp_path / ranks, "masq", compensation=WhitenedLowRank(rank_ratio=0.1, ranks=ranks))  # type: ignore[arg-type]
        bytes_of[ranks] = footprint(nano.adapter.blocks()).to_dict()["adapter_bytes"]
    assert 0.8 * bytes_of["equal"] <= bytes_of["filled"] <= bytes_of["equal"]


def test_a_searched_gauge_leaves_no_more_than_the_factors_as_they_are(tmp_path: Path) -> None:
    nano = make_nano(num_samples=2)
    compensation = WhitenedLowRank(rank_ratio=0.1, gauge="searched")
    report = run(nano, tmp_path, "masq", smoothing=ModalitySmoothing(), compensation=compensation)
    found = [gauge for block in report.blocks for by in block["gauge"].values() for gauge in by.values()]
    assert len(found) == len(report.blocks) * 3 * 2
    assert all(gauge["error"] <= min(gauge["given_error"], gauge["text_error"]) for gauge in found)


def test_a_rotation_behind_smoothing_is_exact_where_nothing_is_rounded(nano_model: Nano) -> None:  # noqa: F811
    """Weight codes of 8 bits on a rotated weight, float activations: the layer is the product with what is stored."""
    fmt = Scheme.preset("w8a8").formats["query"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    factors = {m: torch.rand(12, generator=generator) + 0.5 for m in (Modality.TEXT, Modality.VISION)}
    signs = random_signs(12, 0, "x").float()
    stored = quantize_tensor(rotate(weight * factors[Modality.TEXT].double(), signs.double()), fmt.weight)
    layer = QuantLinear(
        weights={Modality.TEXT: stored}, bias=None, activation=None, context=nano_model.context, smoothing=factors,
        rotation=signs,
    )  # fmt: skip
    modality = torch.tensor([[0, 1, 1, -1]], dtype=torch.int8)
    nano_model.context.set(modality)
    x = torch.randn(1, 4, 12, generator=generator)
    rows = torch.stack([factors[Modality.VISION if m == 1 else Modality.TEXT] for m in modality[0].tolist()])
    expected = rotate(x[0].double() / rows.double(), signs.double()) @ stored.dequantize(torch.float64).t()
    assert torch.allclose(layer(x)[0].double(), expected, atol=1e-5)
    close = (x[0, 0].double() @ weight.t() - layer(x)[0, 0].double()).norm() / (x[0, 0].double() @ weight.t()).norm()
    assert float(close) < 0.02
    again = QuantLinear.from_state(
        layer.state_dict(), weight=fmt.weight, activation=None, context=nano_model.context, dtype=torch.float32
    )
    assert torch.equal(again(x), layer(x))
    nano_model.context.clear()
    with pytest.raises(ModelError, match="rotation behind smoothing"):
        PackedLinear.from_simulated(layer)


def test_a_rotation_behind_smoothing_helps_where_channels_stand_out(nano_model: Nano) -> None:  # noqa: F811
    wide, narrow = (Scheme.preset(name).formats["query"] for name in ("w8a8", "w4a4"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 50, 32, generator=generator)
    x[..., 3] *= 40
    nano_model.context.set(torch.zeros(1, 50, dtype=torch.int8))
    signs, errors = random_signs(32, 0, "x").float(), {}
    for rotation in (signs, None):
        stored = quantize_tensor(weight if rotation is None else rotate(weight, signs.double()), wide.weight)
        layer = QuantLinear(
            weights={Modality.TEXT: stored}, bias=None, activation=narrow.activation, context=nano_model.context,
            rotation=rotation,
        )  # fmt: skip
        errors[rotation is not None] = float((layer(x).double() - x.double() @ weight.t()).norm())
    nano_model.context.clear()
    assert errors[True] < 0.7 * errors[False]


@pytest.mark.parametrize("smoothing", [NoSmoothing(), SharedSmoothing()])
@pytest.mark.parametrize("rotation", [NoRotation(), HadamardRotation()])
def test_centred_inputs_keep_the_float_model(tmp_path: Path, smoothing, rotation) -> None:
    """At eight bits little is lost, whatever a norm has folded or a rotation has mixed."""
    nano = make_nano(num_samples=2)
    slots = {"centring": ModalityCentring(), "smoothing": smoothing, "rotation": rotation}
    report = run(nano, tmp_path, "masq", "w8a8", rounding=NearestRounding(), compensation=NoCompensation(), **slots)
    assert all(value > 25 for block in report.blocks for value in block["sqnr"].values())
    layers = [block.linear(role) for block in nano.adapter.blocks() for role in ALL_ROLES]
    assert all(isinstance(layer, QuantLinear) and layer.centre is not None for layer in layers)
    assert footprint(nano.adapter.blocks()).to_dict()["centres"] > 0


def test_nothing_to_search_without_smoothing(tmp_path: Path) -> None:
    nano = make_nano(num_samples=2)
    report = run(nano, tmp_path, "masq", smoothing=NoSmoothing())
    assert all("gauge" not in block for block in report.blocks)


def test_a_share_needs_a_remainder() -> None:
    with pytest.raises(ConfigError, match="remainder"):
        GptqRounding(share="signal")
    with pytest.raises(ConfigError, match="power"):
        ConvexModalitySmoothing(power=1)
    with pytest.raises(ConfigError, match="at least one group"):
        SmoothedHadamardRotation(groups=())


def test_another_base_is_stored_and_text_corrected(tmp_path: Path) -> None:
    """At full rank every modality but the base has its float weight again; such a layer is not packed."""
    nano = make_nano(num_samples=2)
    weight = nano.adapter.blocks()[0].linear(Role.QUERY).weight.detach().double()
    full = WhitenedLowRank(rank_ratio=1.0, base="vision", dtype="float32")
    made = stages("rtn", "w4a8", smoothing=ModalitySmoothing(), rounding=NearestRounding(), compensation=full)
    stores = {"blocks": BlockStore(tmp_path / "blocks"), "factors": BlockStore(tmp_path / "factors")}
    loop.quantize(nano.adapter, nano.batches, made, nano.context, **stores)
    layer = nano.adapter.blocks()[0].linear(Role.QUERY)
    assert isinstance(layer, QuantLinear)
    assert layer.correction_modalities == (Modality.TEXT, Modality.AUDIO)
    stored = layer.codes_text.double() * layer.scale_text.double()
    factors = {m: 1 / layer.inverse_smoothing[layer.smoothing_rows[int(m)]].double() for m in Modality if m >= 0}
    own = quantize_tensor((weight * factors[Modality.VISION]).float(), layer.weight_format)
    assert (stored - own.dequantize(torch.float64)).norm() < 1e-3 * stored.norm()
    for modality in layer.correction_modalities:
        left, right = (getattr(layer, f"{side}_{modality.name.lower()}").double() for side in ("left", "right"))
        wanted = weight * factors[modality]
        assert (stored + (left @ right).t() - wanted).norm() < 1e-4 * wanted.norm()
    with pytest.raises(ModelError, match="corrects no text"):
        PackedLinear.from_simulated(layer)
