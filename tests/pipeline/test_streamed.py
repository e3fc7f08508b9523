"""Streamed weights: the same bits as with everything in memory, for every method, and nothing stays in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from masq.cli import main
from masq.config import RunConfig, decode
from masq.finished import load_finished
from masq.models import loading, tensor_files
from masq.models.base import ModelAdapter
from masq.models.config import ModelConfig
from masq.models.zoo import nano
from masq.report.record import comparable
from masq.run import run
from tests.composing import names, plain
from tests.test_run import splits  # noqa: F401

METHODS = names("method")
KINDS = {"nano_vl": ("vision",), "nano_omni": ("vision", "audio")}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both nano models in many small shards."""
    root = tmp_path_factory.mktemp("published")
    for name in nano.NAMES:
        nano.save_published(name, root / name, 60_000)
    return {name: root / name for name in nano.NAMES}


def model(name: str, source: Path | str, **changes: object) -> ModelConfig:
    family = {"nano_vl": "qwen2_5_vl", "nano_omni": "qwen2_5_omni"}[name]
    modalities = ("text", "vision", *(("audio",) if name == "nano_omni" else ()))
    return ModelConfig(**{"name": name, "family": family, "source": str(source), "modalities": modalities, **changes})


def cell(splits: dict[str, Path], root: Path, source: Path, method: str, weights: str) -> RunConfig:  # noqa: F811
    """A cell of nano_omni with the method as ``conf`` has it, but for one epoch of learning."""
    told = plain("model=nano_omni", f"method={method}", "scheme=w4a6")
    if "learned" in told["method"]["smoothing"].get("kind", ""):
        told["method"]["smoothing"]["epochs"] = 1
    told["model"] |= {"source": str(source), "weights": weights}
    told["calibration"] |= {"samples_per_task": 2, "batch_size": 3, "source": str(splits["calibration"])}
    told["evaluation"] = {"score": False, "samples_per_task": 1, "batch_size": 2, "source": str(splits["evaluation"])}
    told["output"] = {"root": str(root)}
    return decode(told)


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file below a folder."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def is_away(adapter: ModelAdapter) -> bool:
    return all(tensor.is_meta for tensor in adapter.model.state_dict().values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_with_the_same_bits(splits, published, tmp_path, monkeypatch, method):  # noqa: F811
    """Records, stored blocks, learned factors, statistics and the exported checkpoint; activations all go to disk."""
    monkeypatch.setattr(tensor_files, "MEMORY_BYTES", 10_000)
    records, folders = {}, {}
    for weights in ("resident", "streamed"):
        records[weights] = run(cell(splits, tmp_path / weights / "runs", published["nano_omni"], method, weights))
        folders[weights] = next((tmp_path / weights / "runs").glob("nano_omni-*"))
    contents = {weights: comparable(record) for weights, record in records.items()}
    for weights, content in contents.items():
        assert content["config"]["model"].pop("weights") == weights
    assert contents["streamed"] == contents["resident"]
    assert same(bits(tmp_path / "streamed"), bits(tmp_path / "resident"))
    assert {path.name for path in folders["streamed"].iterdir()} == {
        path.name for path in folders["resident"].iterdir()
    }
    if method in ("none", "mas"):
        return
    for weights, folder in folders.items():
        assert main(["export", str(folder), str(tmp_path / f"out-{weights}")]) == 0
    files = {w: {p.name: p.read_bytes() for p in (tmp_path / f"out-{w}").iterdir()} for w in folders}
    assert files["streamed"].keys() == files["resident"].keys()
    assert same(bits(tmp_path / "out-streamed"), bits(tmp_path / "out-resident"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", nano.NAMES)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_streamed_model_runs_like_any_other(published, tmp_path, name, dtype, embedded):
    source = f"zoo:{name}" if embedded else published[name]
    resident = loading.load(model(name, source, dtype=dtype))
    streamed = loading.load(model(name, source, dtype=dtype, weights="streamed"), tmp_path)
    assert is_away(streamed)
    for (a, one), (b, other) in zip(resident.model.named_buffers(), streamed.model.named_buffers(), strict=True):
        assert a == b
        assert torch.equal(one, other), a
    assert streamed.model.config.to_dict() == resident.model.config.to_dict()
    samples = nano.random_samples(KINDS[name], 2)
    batch = resident.encode(samples, with_answer=False)
    with torch.no_grad():
        wanted, found = (adapter.model(**batch.inputs).logits for adapter in (resident, streamed))
    assert torch.equal(found, wanted)
    assert streamed.generate(batch, 4) == resident.generate(batch, 4)
    assert is_away(streamed)
    for block, other in zip(streamed.visited_blocks(), resident.blocks(), strict=True):
        own = block.module.state_dict()
        assert all(torch.equal(own[key], value) for key, value in other.module.state_dict().items())
        assert sum(not one.is_meta for one in streamed.model.state_dict().values()) == len(own)


def test_tied_weights_are_one_tensor(tmp_path, published):
    streamed = loading.load(model("nano_vl", published["nano_vl"], weights="streamed"), tmp_path)
    head, embeddings = streamed.head(), streamed.embeddings()
    assert head.weight is embeddings.weight
    with streamed.residence.present(head), streamed.residence.present(embeddings):
        assert not head.weight.is_meta
        assert head.weight is embeddings.weight
    with pytest.raises(ValueError, match="must be untied"), streamed.residence.present(head, after="spill"):
        pass
    assert is_away(streamed)


def test_changes_are_kept_only_where_asked(tmp_path, published):
    streamed = loading.load(model("nano_omni", published["nano_omni"], weights="streamed"), tmp_path)
    for block in streamed.visited_blocks():
        block.linear("up").weight.fill_(1.0)
    for block in streamed.visited_blocks("spill"):
        assert not bool((block.linear("up").weight == 1.0).all())
        block.linear("up").weight.fill_(2.0)
    for block in streamed.visited_blocks("stay"):
        assert bool((block.linear("up").weight == 2.0).all())
    assert not any(block.linear("up").weight.is_meta for block in streamed.blocks())


def test_working_files_do_not_outlive_the_model(tmp_path, published):
    streamed = loading.load(model("nano_omni", published["nano_omni"], weights="streamed"), tmp_path)
    embedded = loading.load(model("nano_omni", "zoo:nano_omni", weights="streamed"), tmp_path)
    assert list(tmp_path.iterdir())
    del streamed, embedded
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_exported_streamed_run_loads_and_answers(splits, published, tmp_path):  # noqa: F811
    run(cell(splits, tmp_path, published["nano_omni"], "masquant", "streamed"))
    folder = next(tmp_path.glob("nano_omni-*"))
    adapter = load_finished(folder)
    assert is_away(adapter)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=False)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found, wanted = loaded(**batch.inputs).logits, adapter.model(**batch.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert loaded.generate(**batch.inputs, max_new_tokens=2).shape[1] > batch.inputs["input_ids"].shape[1]


def test_weights_are_not_part_of_the_identity(splits, published, tmp_path):  # noqa: F811
    first = run(cell(splits, tmp_path, published["nano_omni"], "rtn", "resident"))
    again = run(cell(splits, tmp_path, published["nano_omni"], "rtn", "streamed"))
    assert again.to_dict() == first.to_dict()


@pytest.mark.parametrize(("available", "streams"), [(10**4, True), (10**9, False)])
def test_the_machine_may_decide(published, monkeypatch, available, streams):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": available}))
    config = model("nano_omni", published["nano_omni"], weights="auto")
    assert loading.streams(config, published["nano_omni"]) is streams
    assert loading.streams(model("nano_omni", "zoo:nano_omni", weights="auto"), None) is False
    assert json.loads((published["nano_omni"] / "config.json").read_text())
