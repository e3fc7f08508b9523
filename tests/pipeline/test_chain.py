"""Whose activations the stages look at: those of the quantized chain or of the float model, and what runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from masq.calibration import cache as cache_module
from masq.calibration.cache import StatisticsCache
from masq.compensation.config import WhitenedLowRank
from masq.pipeline import loop
from masq.pipeline.loop import QuantizationReport
from masq.pipeline.store import BlockStore, block_tensors
from masq.rounding.config import GptqRounding
from masq.transforms.config import AwqSmoothing, LearnedModalitySmoothing, SharedSmoothing
from tests.nano_fixtures import Nano, make_nano, stages

SLOTS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "smoothquant": {"smoothing": SharedSmoothing()},
    "gptq": {"rounding": GptqRounding()},
    "awq": {"smoothing": AwqSmoothing(tokens=8)},
    "both": {"smoothing": SharedSmoothing(), "compensation": WhitenedLowRank(rank_ratio=0.1)},
    "learned": {"smoothing": LearnedModalitySmoothing(epochs=1), "compensation": WhitenedLowRank(rank_ratio=0.1)},
}


def quantize(nano: Nano, folder: Path, cache: StatisticsCache | None = None, **slots: Any) -> QuantizationReport:
    stores = {name: BlockStore(folder / name) for name in ("blocks", "factors", "gradients")}
    return loop.quantize(nano.adapter, nano.batches, stages("rtn", **slots), nano.context, **stores, cache=cache)


def state(nano: Nano) -> list[dict[str, torch.Tensor]]:
    return [block_tensors(block) for block in nano.adapter.blocks()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", list(SLOTS))
def test_a_cache_changes_nothing_and_is_used(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, reports = [], []
    for run, cache in enumerate((None, StatisticsCache(tmp_path / "cache"), StatisticsCache(tmp_path / "cache"))):
        if run == 2 and name != "awq":
            # The second run with the cache must not look into a block for statistics any more.
            monkeypatch.setattr(cache_module, "collect", refuses_work)
        nano = make_nano()
        reports.append(quantize(nano, tmp_path / str(run), cache, chain="float", **SLOTS[name]).blocks)
        states.append(state(nano))
    for other, report in zip(states[1:], reports[1:], strict=True):
        assert all(same(*pair) for pair in zip(states[0], other, strict=True))
        assert report == reports[0]


def refuses_work(*_args: Any, groups: Any, second_moment: Any, **_kwargs: Any) -> dict[str, Any]:
    assert not list(groups)
    assert not list(second_moment)
    return {}


def test_methods_share_what_they_have_in_common(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path / "cache")
    for name in SLOTS:
        alone, shared = make_nano(), make_nano()
        quantize(alone, tmp_path / f"{name}-alone", chain="float", **SLOTS[name])
        quantize(shared, tmp_path / f"{name}-shared", cache, chain="float", **SLOTS[name])
        assert all(same(*pair) for pair in zip(state(alone), state(shared), strict=True))


@pytest.mark.parametrize("name", ["smoothquant", "gptq", "awq", "both"])
def test_chains_agree_on_the_first_block_and_part_afterwards(name: str, tmp_path: Path) -> None:
    states = {}
    for chain in ("quantized", "float"):
        nano = make_nano()
        quantize(nano, tmp_path / chain, chain=chain, scheme="w4a4", **SLOTS[name])
        states[chain] = state(nano)
    assert same(states["quantized"][0], states["float"][0])
    assert not same(states["quantized"][-1], states["float"][-1])


def test_rounding_to_nearest_sees_no_chain(tmp_path: Path) -> None:
    states = []
    for chain in ("quantized", "float"):
        nano = make_nano()
        quantize(nano, tmp_path / chain, chain=chain)
        states.append(state(nano))
    assert all(same(*pair) for pair in zip(*states, strict=True))
