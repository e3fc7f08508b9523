"""Clip search in the walk over the blocks: less error of outputs, in every combination with other stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from masq.calibration.replay import collect
from masq.compensation.config import WhitenedLowRank
from masq.models.base import Modality, Role
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import Scheme, TensorFormat
from masq.pipeline import loop
from masq.pipeline.loop import QuantizationReport
from masq.pipeline.store import ALL_ROLES, BlockStore
from masq.rounding.clip import round_on, search_clip
from masq.rounding.config import ClipSearch, GptqRounding, NearestRounding
from masq.rounding.stages import pooled_moment
from masq.transforms.config import AwqSmoothing, LearnedModalitySmoothing, ModalitySmoothing, SharedSmoothing
from tests.nano_fixtures import Nano, make_nano, stages

W3 = Scheme("w3", TensorFormat(3), None)
CLIP = NearestRounding(clip=ClipSearch())


def quantize(nano: Nano, folder: Path, scheme: Scheme = W3, **slots: Any) -> QuantizationReport:
    stores = {name: BlockStore(folder / name) for name in ("blocks", "factors", "gradients")}
    return loop.quantize(nano.adapter, nano.batches, stages("rtn", scheme, **slots), nano.context, **stores)


def heavy_tailed(**kinds: Any) -> Nano:
    """Weights with a few large values in every row, which a clip search is for."""
    nano = make_nano(num_samples=6, **kinds)
    for block in nano.adapter.blocks():
        for role in ALL_ROLES:
            weight = block.linear(role).weight.data
            weight[torch.arange(len(weight)), torch.arange(len(weight)) % weight.shape[1]] *= 3
    return nano


def test_less_error_than_full_ranges(tmp_path: Path) -> None:
    plain = quantize(heavy_tailed(), tmp_path / "rtn")
    clipped = quantize(heavy_tailed(), tmp_path / "clip", rounding=CLIP)
    for before, after in zip(plain.blocks, clipped.blocks, strict=True):
        assert after["rounding_gain"] < 0.95
        assert after["rounding_fallbacks"] == {}
        assert set(after["rounding"]) == {str(role) for role in ALL_ROLES}
        for details in after["rounding"].values():
            assert set(details) == {"gain", "clip_ratio"}
            assert 0.5 <= details["clip_ratio"] < 1
            assert details["gain"] < 1
        assert sum(after["sqnr"].values()) > sum(before["sqnr"].values())
    assert clipped.warnings == []


def test_the_stored_weight_is_that_of_the_pooled_moment(tmp_path: Path) -> None:
    nano = heavy_tailed()
    block = nano.adapter.blocks()[0]
    weight = block.linear(Role.GATE).weight.detach().double().clone()
    moment = pooled_moment(collect(block, nano.hidden, nano.replay, second_moment=("gate_up",))["gate_up"], {})
    quantize(nano, tmp_path, rounding=CLIP)
    expected = round_on(weight, search_clip(weight, moment, W3.weight, ClipSearch()), W3.weight)
    assert torch.equal(block.linear(Role.GATE).codes_text, expected.codes)
    assert torch.equal(block.linear(Role.GATE).scale_text, expected.scale)


def test_roles_left_out_keep_their_full_range(tmp_path: Path) -> None:
    nano, plain = heavy_tailed(), heavy_tailed()
    some = NearestRounding(clip=ClipSearch(roles=("gate", "up", "down")))
    report = quantize(nano, tmp_path / "some", rounding=some)
    quantize(plain, tmp_path / "plain")
    details = report.blocks[0]["rounding"]
    assert {role for role in details if "clip_ratio" in details[role]} == {"gate", "up", "down"}
    for role in ALL_ROLES:
        same = torch.equal(*(n.adapter.blocks()[0].linear(role).scale_text for n in (nano, plain)))
        assert same == (role not in some.clip.roles)


def test_a_weight_per_modality_is_clipped_by_its_own_tokens(tmp_path: Path) -> None:
    nano = heavy_tailed()
    block = nano.adapter.blocks()[0]
    weight = block.linear(Role.QUERY).weight.detach().double().clone()
    rounding = replace(CLIP, per_modality=True)
    stats = collect(block, nano.hidden, nano.replay, second_moment=("qkv",))["qkv"]
    quantize(nano, tmp_path, smoothing=ModalitySmoothing(), rounding=rounding)
    layer = block.linear(Role.QUERY)
    assert isinstance(layer, QuantLinear)
    for which in (Modality.TEXT, Modality.VISION, Modality.AUDIO):
        factor = layer.inverse_smoothing[int(which)].double().reciprocal().float()
        moment = pooled_moment(stats, {which: factor}, (which,))
        grid = search_clip(weight * factor.double(), moment, W3.weight, ClipSearch())
        torch.testing.assert_close(getattr(layer, f"scale_{which.name.lower()}"), grid.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "slots",
    [
        {"rounding": GptqRounding(clip=ClipSearch())},
        {"rounding": GptqRounding(clip=ClipSearch(moments="diagonal"), tokens="text")},
        {"smoothing": AwqSmoothing(steps=8), "rounding": CLIP},
        {"smoothing": SharedSmoothing(), "rounding": CLIP, "compensation": WhitenedLowRank(rank_ratio=0.2)},
        {
            "smoothing": LearnedModalitySmoothing(epochs=1),
            "rounding": CLIP,
            "compensation": WhitenedLowRank(rank_ratio=0.2, activations="float"),
        },
    ],
    ids=["gptq", "gptq_text", "awq", "low_rank", "masquant_float"],
)
@pytest.mark.parametrize("scheme", ["w4a6", "w3g8"])
def test_every_other_stage_combines(tmp_path: Path, slots: dict[str, Any], scheme: str) -> None:
    grouped = TensorFormat(3, symmetric=False, granularity="per_group", group_size=8)
    made = Scheme("w3g8", grouped, None) if scheme == "w3g8" else Scheme.preset(scheme)
    report = quantize(heavy_tailed(), tmp_path, made, **slots)
    for block in report.blocks:
        assert block["rounding_gain"] < 1
        assert all("clip_ratio" in details for details in block["rounding"].values())
        assert block["rounding_fallbacks"] == {}
