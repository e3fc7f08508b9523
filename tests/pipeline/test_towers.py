"""Quantized vision and audio towers: the numbers, every family, streaming, packing, export, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from masq.calibration.replay import capture
from masq.config import RunConfig, decode, to_dict
from masq.errors import ConfigError, DataError, ModelError
from masq.export import checkpoint, compressed_tensors
from masq.finished import load_finished
from masq.identity import folder_name, identity
from masq.models.base import Modality
from masq.models.config import TAKES
from masq.models.loading import load
from masq.models.zoo import nano
from masq.modules.footprint import footprint_of
from masq.modules.packed_linear import PackedLinear, tower_linears
from masq.modules.quant_linear import QuantLinear
from masq.numerics.scheme import RoundedTowers, TensorFormat
from masq.pipeline.towers import FILE, linears_of, quantize_towers, restore_towers
from masq.report.record import RunRecord, comparable
from masq.report.table import table
from masq.run import run
from tests.nano_fixtures import NANO, nano_adapter
from tests.test_families import plain as family_plain
from tests.test_run import plain, splits  # noqa: F401

W8A8 = {"kind": "nearest", "weight": {"bits": 8}, "activation": {"bits": 8, "granularity": "per_token"}}
W4A16 = {"kind": "nearest", "weight": {"bits": 4}, "activation": None}
SHORT = {"score": False, "samples_per_task": 1, "batch_size": 2}


def config(splits: dict[str, Path], root: Path, towers: dict[str, Any] | None, **changes: Any) -> RunConfig:  # noqa: F811
    method = changes.pop("method", "rtn")
    raw = plain(splits, root, method, evaluation={**SHORT, "source": str(splits["evaluation"])}, **changes)
    return decode({**raw, **({} if towers is None else {"towers": towers})})


def formats(weight_bits: int, activation_bits: int | None) -> RoundedTowers:
    activation = None if activation_bits is None else TensorFormat(activation_bits, granularity="per_token")
    return RoundedTowers(TensorFormat(weight_bits), activation)


def entering(adapter: Any, kinds: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the first block, and the modality of its tokens."""
    batch = adapter.encode(nano.random_samples(kinds, 2), with_answer=True)
    return capture(adapter, [batch])[0][0], batch.modality


@pytest.mark.parametrize("name", NANO)
def test_weights_alone_are_those_of_the_float_model_rounded(name: str, tmp_path: Path) -> None:
    """Every linear of every tower, against weights that are rounded in place with float64 arithmetic."""
    expected, found = (nano_adapter(name) for _ in range(2))
    media = tuple(kind for kind in TAKES[NANO[name]] if kind != "text")
    for tower in expected.towers().values():
        for module in tower.modules():
            if type(module) is nn.Linear:
                weight = module.weight.detach().double()
                step = weight.abs().amax(1, keepdim=True) / 7
                module.weight.data = ((weight / step).round().clamp(-7, 7) * step).float()
    quantize_towers(found, formats(4, None), tmp_path)
    linears = [one for tower in found.towers().values() for one in tower.modules()]
    assert any(isinstance(one, QuantLinear) for one in linears)
    assert not any(type(one) is nn.Linear for one in linears)
    (wanted, modality), (hidden, _) = entering(expected, media), entering(found, media)
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
    text = modality == int(Modality.TEXT)
    assert torch.equal(hidden[text], entering(nano_adapter(name), media)[0][text])


def test_inputs_are_rounded_row_by_row(tmp_path: Path) -> None:
    """One linear of a tower on rows [N, I], against float64."""
    adapter = nano_adapter("nano_vl")
    name, tower = next(iter(adapter.towers().items()))
    path, linear = next(iter(linears_of(tower)))
    weight, bias = linear.weight.detach().double(), linear.bias
    quantize_towers(adapter, formats(8, 8), tmp_path)
    layer = adapter.model.get_submodule(f"{name}.{path}")
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))

    def rounded(values: torch.Tensor) -> torch.Tensor:
        step = values.abs().amax(1, keepdim=True) / 127
        return (values / step).round() * step

    wanted = functional.linear(rounded(x.double()), rounded(weight), None if bias is None else bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x.view(1, 5, -1))[0], layer(x))


def test_projections_that_torch_reads_itself_are_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert list(linears_of(nn.Sequential(attention))) == []
    assert [path for path, _ in linears_of(nn.Sequential(attention, nn.Linear(2, 2)))] == ["1"]


def test_stored_towers_are_restored_or_missed(tmp_path: Path) -> None:
    first, second, third = (nano_adapter("nano_omni") for _ in range(3))
    quantize_towers(first, formats(8, 8), tmp_path)
    restore_towers(second, formats(8, 8), tmp_path)
    kinds = ("vision", "audio")
    assert torch.equal(entering(first, kinds)[0], entering(second, kinds)[0])
    assert footprint_of(tower_linears(first)).effective_bits == pytest.approx(8, abs=2)
    (tmp_path / FILE).unlink()
    with pytest.raises(DataError, match="must be stored beside its blocks"):
        restore_towers(third, formats(8, 8), tmp_path)


@pytest.fixture(scope="module")
def widths(splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:  # noqa: F811
    root = tmp_path_factory.mktemp("widths")
    towers = {"float": None, "w8a8": W8A8, "w4a16": W4A16}
    return {name: run(config(splits, root, one)) for name, one in towers.items()}


def test_towers_have_fidelity_lines_of_their_own(widths: dict[str, RunRecord]) -> None:
    assert "sqnr_towers" not in widths["float"].fidelity
    assert "towers" not in widths["float"].effective_bits
    better, worse = (widths[name].fidelity["sqnr_towers"] for name in ("w8a8", "w4a16"))
    assert set(better) == {"vision", "audio"}
    assert all(better[one] > worse[one] + 10 for one in better)
    assert set(widths["w8a8"].fidelity["standard_error"]["sqnr_towers"]) == {"vision", "audio"}
    assert widths["w4a16"].effective_bits["towers"] < widths["w8a8"].effective_bits["towers"]
    assert widths["w4a16"].effective_bits["total"] == widths["float"].effective_bits["total"]
    assert "towers are rounded to nearest at w8a8" in widths["w8a8"].warnings
    text = table(list(widths.values()))
    assert "SQNR vision from towers (dB)" in text
    assert [row.split("|")[3].strip() for row in text.splitlines()[2:5]] == ["float", "w8a8", "w4a16"]


def test_a_run_is_known_by_its_towers(splits: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    plain_config, with_towers = config(splits, tmp_path, None), config(splits, tmp_path, W8A8)
    assert identity(plain_config, {}) == identity(config(splits, tmp_path, {"kind": "none"}), {})
    assert identity(plain_config, {}) != identity(with_towers, {})
    assert "w4a6+towers=w8a8-rtn" in folder_name(with_towers, "0")
    assert decode(to_dict(with_towers)) == with_towers


@pytest.mark.parametrize(
    ("towers", "method", "message"),
    [
        (W8A8, "none", "leaves towers in float"),
        ({"kind": "nearest", "weight": {"bits": 4, "granularity": "per_group", "group_size": 16}}, "rtn", "per output"),
        ({"kind": "nearest", "weight": {"bits": 8, "granularity": "per_token"}}, "rtn", "per_channel"),
        ({**W8A8, "activation": {"bits": 8}}, "rtn", "per_token"),
        ({"kind": "nearst", "weight": {"bits": 8}}, "rtn", "nearest"),
    ],
)
def test_towers_that_mean_nothing_are_refused(
    splits: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    towers: dict[str, Any],
    method: str,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(splits, tmp_path, towers, method=method)


@pytest.mark.parametrize("name", NANO)
def test_every_family_streams_and_exports_them(splits: dict[str, Path], tmp_path: Path, name: str) -> None:  # noqa: F811
    """Rotated, so that the last linear of a tower is one that was changed before; resident and streamed bits agree."""
    records, exported = {}, {}
    for weights in ("resident", "streamed"):
        raw = {**family_plain(splits, tmp_path / weights, name, "quarot"), "towers": W8A8}
        raw["model"]["weights"] = weights
        raw["evaluation"] |= SHORT
        records[weights] = comparable(run(decode(raw)))
        [folder] = [path.parent for path in (tmp_path / weights).glob("*/record.json")]
        checkpoint.save(load_finished(folder), tmp_path / f"{weights}-exported", {})
        exported[weights] = load_file(tmp_path / f"{weights}-exported" / "model.safetensors")
    assert records["streamed"]["fidelity"] == records["resident"]["fidelity"]
    assert exported["streamed"].keys() == exported["resident"].keys()
    assert all(torch.equal(exported["streamed"][key], value) for key, value in exported["resident"].items())


def test_a_checkpoint_and_packed_execution_answer_as_the_simulation(
    splits: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    widths: dict[str, RunRecord],
) -> None:
    packed = run(config(splits, tmp_path, W8A8, execution="packed"))
    for key in ("sqnr_towers", "sqnr", "nll"):
        assert packed.fidelity[key] == pytest.approx(widths["w8a8"].fidelity[key], rel=1e-3)
    assert packed.effective_bits == widths["w8a8"].effective_bits
    adapter = load_finished(next(path.parent for path in tmp_path.glob("*/record.json")))
    linears = tower_linears(adapter)
    assert linears
    assert all(isinstance(one, PackedLinear) for one in linears)
    description = checkpoint.save(adapter, tmp_path / "out", {})
    assert description.version == 4
    assert sum(entry.tower for entry in description.linears.values()) == len(linears)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=False)
    with torch.no_grad():
        found, wanted = loaded(**batch.inputs).logits, adapter.model(**batch.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_from_disk_keeps_its_towers(splits: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Killed behind the towers: they are read again, not made again."""
    run_config = config(splits, tmp_path, W8A8, method="smoothquant")
    first = run(run_config)
    [folder] = [path.parent for path in tmp_path.glob("*/record.json")]
    kept = (folder / "blocks" / FILE).stat().st_mtime_ns
    (folder / "record.json").unlink()
    for block in (folder / "blocks").glob("block-*"):
        block.unlink()
    again = run(run_config)
    assert (folder / "blocks" / FILE).stat().st_mtime_ns == kept
    assert again.fidelity == first.fidelity
    assert load(run_config.model).towers().keys() == {"model.visual", "model.audio_tower"}


def test_other_engines_get_towers_of_the_decoder_s_format(splits: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """compressed-tensors has one format for all linears: towers are quantized like the decoder, or in float."""
    run(config(splits, tmp_path / "same", W8A8, method="smoothquant", scheme="w8a8"))
    run(config(splits, tmp_path / "other", W4A16, method="smoothquant", scheme="w8a8"))
    folders = {
        name: next(path.parent for path in (tmp_path / name).glob("*/record.json")) for name in ("same", "other")
    }
    compressed_tensors.save(load_finished(folders["same"]), tmp_path / "out", {})
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum("visual" in name and name.endswith("weight_scale") for name in stored) > 0
    with pytest.raises(ModelError, match="one format of all quantized linears"):
        compressed_tensors.save(load_finished(folders["other"]), tmp_path / "no", {})
