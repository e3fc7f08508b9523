"""Every model family from calibration to record, by every kind of method, on a tiny random model of its real class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from masq.config import decode
from masq.export import checkpoint
from masq.finished import load_finished
from masq.models.config import TAKES
from masq.models.zoo import nano
from masq.plan import plan
from masq.report.record import RunRecord, comparable
from masq.run import run
from tests.nano_fixtures import NANO
from tests.test_run import METHODS, write_split

ROOT = Path(__file__).parent.parent
QUAROT = {"rotation": {"kind": "hadamard"}}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Calibration and evaluation data of all tasks; a run takes those that its model can."""
    folder = tmp_path_factory.mktemp("data")
    seeds = {"calibration": 100, "evaluation": 200}
    return {name: write_split(folder / f"{name}.parquet", name, 2, seed) for name, seed in seeds.items()}


def plain(splits: dict[str, Path], root: Path, name: str, method: str) -> dict[str, Any]:
    return {
        "model": yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()),
        "modality": {"name": "dual"},
        "scheme": {
            "name": "w4a6",
            "weight": {"bits": 4},
            "activation": {"bits": 6, "granularity": "per_token"},
        },
        "method": {"name": method, **{**METHODS, "quarot": QUAROT}[method]},
        "calibration": {"samples_per_task": 2, "batch_size": 2, "source": str(splits["calibration"])},
        "evaluation": {"batch_size": 2, "max_new_tokens": 2, "source": str(splits["evaluation"])},
        "output": {"root": str(root)},
    }


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "masquant", "quarot", "gptq"])
@pytest.mark.parametrize("name", nano.FURTHER)
def test_every_kind_of_method_runs(splits: dict[str, Path], tmp_path: Path, name: str, method: str) -> None:
    record = run(decode(plain(splits, tmp_path, name, method)))
    takes = TAKES[NANO[name]]
    assert_complete(record, takes[1])
    assert set(record.fidelity["sqnr"]) == set(takes)
    assert all(set(block["sqnr"]) == set(takes) for block in record.blocks)
    planned = plan(decode(plain(splits, tmp_path, name, method)))
    assert record.effective_bits["total"] == pytest.approx(planned.effective_bits)


def assert_complete(record: RunRecord, medium: str) -> None:
    assert record.status == "finished"
    assert set(record.scores) == {{"vision": "read", "audio": "speech"}[medium], "manual", "choice"}
    assert all(0 < value < 60 for value in record.fidelity["sqnr"].values())
    assert len(record.blocks) == 3


@pytest.mark.parametrize("name", nano.FURTHER)
def test_the_float_model_is_compared_with_itself(splits: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Two copies of a model on the same samples are the same to the last bit."""
    record = run(decode(plain(splits, tmp_path, name, "none")))
    assert set(record.fidelity["sqnr"].values()) == {200.0}
    assert record.fidelity["kl"]["text"] == 0


@pytest.mark.parametrize("name", nano.FURTHER)
def test_streamed_weights_give_the_same_bits(splits: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Rotated, quantized, scored and exported with weights on disk: as with all of them in memory."""
    records, exported = {}, {}
    for weights in ("resident", "streamed"):
        raw = plain(splits, tmp_path / weights, name, "quarot")
        raw["model"]["weights"] = weights
        records[weights] = comparable(run(decode(raw)))
        [folder] = [path.parent for path in (tmp_path / weights).glob("*/record.json")]
        checkpoint.save(load_finished(folder), tmp_path / f"{weights}-exported", {})
        exported[weights] = load_file(tmp_path / f"{weights}-exported" / "model.safetensors")
    for key in ("scores", "fidelity", "blocks"):
        assert records["streamed"][key] == records["resident"][key]
    assert exported["streamed"].keys() == exported["resident"].keys()
    assert all(torch.equal(exported["streamed"][key], value) for key, value in exported["resident"].items())


@pytest.mark.parametrize(
    ("name", "weights"), [*((name, "resident") for name in ("nano_vl", *nano.FURTHER)), ("nano_qwen3_vl", "streamed")]
)
def test_norms_and_gates_fused(splits: dict[str, Path], tmp_path: Path, name: str, weights: str) -> None:
    """Every family's blocks are of a kind that can be, and their numbers move by rounding alone."""
    found = {}
    for execution in ("packed", "fused"):
        raw = plain(splits, tmp_path, name, "masquant") | {"execution": execution, "kernel": "reference"}
        raw["model"]["weights"] = weights
        found[execution] = run(decode(raw))
    assert found["fused"].provenance["fused"] == 3 * 3
    for key in ("nll", "kl"):
        assert found["fused"].fidelity[key] == pytest.approx(found["packed"].fidelity[key], rel=1e-2)


@pytest.mark.parametrize("name", NANO)
def test_the_sizes_in_the_configuration_are_those_of_the_model(name: str) -> None:
    from masq.models.architecture import count_parameters
    from masq.models.config import Architecture

    sizes = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["architecture"]
    model, _ = nano.build(name, tied=sizes["tied_embeddings"])
    assert sum(count_parameters(Architecture(**sizes)).values()) == sum(one.numel() for one in model.parameters())
