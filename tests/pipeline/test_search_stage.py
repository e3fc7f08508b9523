"""Searched smoothing in the walk over the blocks: better than none, resumable, combined with every other stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from masq.compensation.config import WhitenedLowRank
from masq.models.qwen2_5_vl import Qwen25VLAdapter
from masq.models.zoo import nano as zoo
from masq.modules.modality import install
from masq.numerics.scheme import Scheme, TensorFormat
from masq.pipeline import loop
from masq.pipeline.loop import QuantizationReport
from masq.pipeline.store import BlockStore, block_tensors
from masq.rounding.config import GptqRounding
from masq.transforms.config import AwqSmoothing, MbqSmoothing
from masq.transforms.frame import HadamardRotation
from tests.nano_fixtures import Nano, killed_after, make_nano, stages

W3A16 = Scheme("w3a16", TensorFormat(3, symmetric=False, granularity="per_group", group_size=8), None)
SCHEMES: dict[str, str | Scheme] = {"w4a6": "w4a6", "w3a16": W3A16}


def with_outliers(nano: Nano) -> Nano:
    """Loud channels in front of the linears, as real models have them."""
    for block in nano.adapter.blocks():
        for group in ("qkv", "gate_up"):
            block.norm(group).weight.data[::9] *= 12
    return nano


def make_vl() -> Nano:
    adapter = Qwen25VLAdapter(*zoo.build("nano_vl"))
    context, _ = install(adapter)
    samples = [zoo.random_samples(kind, 3, seed=3 + index) for index, kind in enumerate((("vision",), ()))]
    return Nano(adapter, context, samples, [adapter.encode(group, with_answer=True) for group in samples])


def quantize(nano: Nano, folder: Path, scheme: str | Scheme = "w4a6", **slots: Any) -> QuantizationReport:
    stores = {name: BlockStore(folder / name) for name in ("blocks", "factors", "gradients")}
    return loop.quantize(nano.adapter, nano.batches, stages("rtn", scheme, **slots), nano.context, **stores)


def state(nano: Nano) -> list[dict[str, torch.Tensor]]:
    return [block_tensors(block) for block in nano.adapter.blocks()]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", [make_nano, make_vl])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_less_error_than_without(tmp_path: Path, make: Any, scheme: str) -> None:
    plain = quantize(with_outliers(make()), tmp_path / "rtn", SCHEMES[scheme])
    searched = quantize(with_outliers(make()), tmp_path / "awq", SCHEMES[scheme], smoothing=AwqSmoothing())
    for block in searched.blocks:
        assert set(block["search"]) == {"qkv", "output", "gate_up", "down"}
        assert all(found["error_ratio"]["all"] <= 1 for found in block["search"].values())
    assert sum(searched.blocks[-1]["sqnr"].values()) > sum(plain.blocks[-1]["sqnr"].values()) + 1


def test_no_gain_is_no_smoothing(tmp_path: Path) -> None:
    """A grid of one point is alpha 0: bit for bit what no smoothing gives."""
    results = []
    for name, slots in {"rtn": {}, "awq": {"smoothing": AwqSmoothing(steps=1)}}.items():
        nano = make_nano()
        quantize(nano, tmp_path / name, **slots)
        results.append(state(nano))
    assert same(*results)


def test_weight_only_search_keeps_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    real = loop.quantize_one

    def spying(*args: Any) -> Any:
        kept.append(sum(int(mask.sum()) for mask in args[-1].sample.kept.values()))
        return real(*args)

    monkeypatch.setattr(loop, "quantize_one", spying)
    quantize(make_nano(), tmp_path / "a16", W3A16, smoothing=AwqSmoothing(tokens=20))
    assert kept == [0, 0, 0]
    quantize(make_nano(), tmp_path / "a6", smoothing=AwqSmoothing(tokens=20))
    assert kept[3:] == [60, 60, 60]


# awq saves three blocks; mbq the gradients of four batches, then the blocks.
@pytest.mark.parametrize(
    ("smoothing", "after"), [(AwqSmoothing(), 1), (AwqSmoothing(), 2), *((MbqSmoothing(), n) for n in (2, 4, 6))]
)
def test_resume_is_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smoothing: AwqSmoothing | MbqSmoothing, after: int
) -> None:
    undisturbed = make_nano()
    expected = quantize(undisturbed, tmp_path / "a", smoothing=smoothing)
    with killed_after(after):
        quantize(make_nano(), tmp_path / "b", smoothing=smoothing)
    resumed = make_nano()
    calls: list[object] = []
    real_sums = loop.gradient_sums
    monkeypatch.setattr(loop, "gradient_sums", lambda *args: calls.append(args) or real_sums(*args))
    report = quantize(resumed, tmp_path / "b", smoothing=smoothing)
    assert len(calls) == (max(0, 4 - after) if isinstance(smoothing, MbqSmoothing) else 0)
    assert same(state(resumed), state(undisturbed))
    assert report.blocks == expected.blocks


def test_equal_sensitivities_are_awq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MBQ with a weight of one for every modality is AWQ with the same error, bit for bit; with its own it is not."""
    results, notes = {}, {}
    for name, smoothing in {
        "awq": AwqSmoothing(error="absolute"),
        "mbq": MbqSmoothing(),
        "own": MbqSmoothing(),
    }.items():
        nano = with_outliers(make_nano())
        with monkeypatch.context() as patch:
            if name == "mbq":
                patch.setattr(loop, "relative_sensitivity", lambda means, _: [dict.fromkeys(m, 1.0) for m in means])
            notes[name] = quantize(nano, tmp_path / name, smoothing=smoothing).blocks
        results[name] = state(nano)
    assert same(results["awq"], results["mbq"])
    assert [block["search"] for block in notes["awq"]] == [block["search"] for block in notes["mbq"]]
    assert all(block["sensitivity"] == {"text": 1.0, "vision": 1.0, "audio": 1.0} for block in notes["mbq"])
    assert [block["search"] for block in notes["awq"]] != [block["search"] for block in notes["own"]]
    for block in notes["own"]:
        assert block["sensitivity"]["text"] == 1.0
        assert all(found["error_ratio"]["all"] <= 1 for found in block["search"].values())


def test_sensitivities_belong_to_the_model_before_rotation(tmp_path: Path) -> None:
    """They are those of the outputs that a rotation would mix, so that a rotated run weighs modalities alike."""
    weights = [
        [block["sensitivity"] for block in quantize(make_nano(), tmp_path / name, **slots).blocks]
        for name, slots in {
            "plain": {"smoothing": MbqSmoothing()},
            "rotated": {"smoothing": MbqSmoothing(), "rotation": HadamardRotation()},
        }.items()
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize(
    "slots",
    [
        {"rounding": GptqRounding()},
        {"rotation": HadamardRotation(), "rounding": GptqRounding(tokens="text")},
        {"compensation": WhitenedLowRank(rank_ratio=0.2)},
        {"compensation": WhitenedLowRank(rank_ratio=0.2, activations="float", gauge="text")},
    ],
    ids=["gptq", "quarot_gptq", "low_rank", "low_rank_float"],
)
def test_every_other_stage_combines(tmp_path: Path, scheme: str, slots: dict[str, Any]) -> None:
    smoothing = MbqSmoothing(steps=10) if "compensation" in slots else AwqSmoothing(steps=10)
    report = quantize(with_outliers(make_nano()), tmp_path, SCHEMES[scheme], smoothing=smoothing, **slots)
    assert all("search" in block for block in report.blocks)
    assert all(value > 0 for value in report.blocks[-1]["sqnr"].values())
