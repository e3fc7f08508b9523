"""The measurement behind the discrimination report: ranges, who dictates, and what a shared factor costs."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.misalignment import report
from experiments.misalignment.measure import group_costs, group_ranges, measure_block
from masq.calibration.statistics import GroupAccumulator, GroupStatistics, TokenSample
from masq.models.base import GROUPS, Modality
from masq.numerics.scheme import Scheme
from tests.nano_fixtures import Nano, nano_model  # noqa: F401

TEXT, VISION, AUDIO = Modality.TEXT, Modality.VISION, Modality.AUDIO
W8A8 = Scheme.preset("w8a8")


def statistics(rows: torch.Tensor, modality: torch.Tensor) -> GroupStatistics:
    accumulator = GroupAccumulator(False, TokenSample.draw([modality], 1000, 0))
    accumulator.update(rows, modality)
    return accumulator.result()


def drawn(num_modalities: int, channels: int = 13) -> tuple[GroupStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 60, channels, generator=generator)
    modality = (torch.arange(60) % num_modalities).to(torch.int8)[None]
    return statistics(rows, modality), torch.randn(7, channels, generator=generator)


def test_ranges_and_dictators_by_hand() -> None:
    rows = torch.tensor([[[1.0, -2.0, 0.0], [-4.0, 1.0, 3.0], [0.5, 6.0, 1.0]]])
    found = group_ranges(statistics(rows, torch.tensor([[0, 1, 2]], dtype=torch.int8)))
    # Channel 2 is silent on text: it has no ratio, but a dictator.
    assert found["text"] == {"ratio_p10": 1, "ratio_median": 1, "ratio_p90": 1, "dictated": 0}
    assert found["vision"]["ratio_median"] == pytest.approx((4.0 + 0.5) / 2)
    assert found["audio"]["ratio_median"] == pytest.approx((0.5 + 3.0) / 2)
    assert found["vision"]["dictated"] == pytest.approx(2 / 3)
    assert found["audio"]["dictated"] == pytest.approx(1 / 3)


def test_one_modality_alone_pays_nothing() -> None:
    stats, weight = drawn(1)
    cost = group_costs(stats, [weight], W8A8)["text"]
    assert cost["own"] == cost["shared"] != cost["none"]


def test_a_shared_factor_dictated_by_others_costs_the_rest() -> None:
    """Vision is loud in every other channel; text pays for it, vision does not."""
    generator = torch.Generator().manual_seed(1)
    loud = torch.where(torch.arange(32) % 2 == 0, 300.0, 1.0)
    rows = torch.randn(1, 400, 32, generator=generator)
    modality = (torch.arange(400) % 2).to(torch.int8)[None]
    rows = torch.where(modality.unsqueeze(-1) == 1, rows * loud, rows)
    weight = torch.randn(24, 32, generator=generator)
    costs = group_costs(statistics(rows, modality), [weight], Scheme.preset("w4a6"))
    assert costs["text"]["own"] - costs["text"]["shared"] > 3
    assert abs(costs["vision"]["own"] - costs["vision"]["shared"]) < 1


def test_costs_are_the_sqnr_of_a_float64_reference() -> None:
    stats, weight = drawn(2)
    rows = stats.rows[VISION].double()
    factor = (stats.abs_max[VISION].double() / weight.double().abs().amax(0)).sqrt().float().double()

    def levels(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    exact, found = rows @ weight.double().T, levels(rows / factor) @ levels(weight.double() * factor).T
    sqnr = 10 * torch.log10(exact.pow(2).sum(-1) / (exact - found).pow(2).sum(-1))
    assert group_costs(stats, [weight], W8A8)["vision"]["own"] == pytest.approx(float(sqnr.mean()), abs=0.02)


def test_every_group_of_a_block_is_measured(nano_model: Nano) -> None:  # noqa: F811
    sample = TokenSample.draw([batch.modality for batch in nano_model.replay], 16, 0)
    found = measure_block(nano_model.adapter.blocks()[0], nano_model.hidden, nano_model.replay, sample)
    assert list(found) == list(GROUPS)
    for group in found.values():
        assert set(group["ranges"]) == {"text", "vision", "audio"}
        assert sum(one["dictated"] for one in group["ranges"].values()) == pytest.approx(1)
        values = [v for by in group["sqnr"].values() for kinds in by.values() for v in kinds.values()]
        assert all(math.isfinite(value) for value in values)
        for kind in ("none", "shared", "own"):
            assert group["sqnr"]["w8a8"]["text"][kind] > group["sqnr"]["w4a4"]["text"][kind]


def test_tables_of_the_report_take_means_over_blocks() -> None:
    def block(ratio: float, own: float) -> dict:
        ranges = {"ratio_p10": 0.5, "ratio_median": ratio, "ratio_p90": 2.0, "dictated": 0.25}
        costs = {"w4a6": {"audio": {"none": 8.0, "shared": 10.0, "own": own}}}
        return {"qkv": {"ranges": {"audio": ranges}, "sqnr": costs}}

    record = {"blocks": [block(0.5, 10.5), block(1.5, 12.5)]}
    assert "| 1.00           | 0.50 to 1.50 (block 1)" in report.range_table(record)
    assert "25 %" in report.range_table(record)
    assert "| +1.50          | +0.50 to +2.50 |" in report.cost_table(record, "w4a6")
    assert report.layer_table(record, "qkv").splitlines()[-1].split("|")[2].strip() == "1.50"
