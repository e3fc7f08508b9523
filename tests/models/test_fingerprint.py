from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from masq.models.config import ModelConfig
from masq.models.fingerprint import fingerprint
from masq.models.loading import source_folder
from masq.models.zoo import nano


def config(source: object) -> ModelConfig:
    return ModelConfig("m", "qwen2_5_omni", str(source), ("text", "vision", "audio"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the published layout, several shards."""
    folder = tmp_path_factory.mktemp("checkpoint")
    nano.save_published("nano_omni", folder, 60_000)
    return folder


def of(folder: Path) -> str:
    return fingerprint(config(folder), source_folder(config(folder)))


def test_embedded_models_are_known_by_their_checksums_or_names() -> None:
    names = ("smol_omni", "smol_vl", "nano_omni", "nano_vl")
    assert len({fingerprint(config(f"zoo:{name}"), None) for name in names}) == 4


@pytest.mark.parametrize("source", ["zoo:smol_omni", "zoo:smol_vl"])
def test_trained_models_are_known_by_files_and_language_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    from masq.models.zoo import smol_omni

    original = fingerprint(config(source), None)
    with monkeypatch.context() as patch:
        (tmp_path / smol_omni.CHECKSUMS).write_text("other files")
        patch.setattr(smol_omni, "FOLDER", tmp_path)
        assert fingerprint(config(source), None) != original
    other = tmp_path / "other.gguf"
    other.write_bytes(b"another language model")
    monkeypatch.setattr(smol_omni, "language_file", lambda: SimpleNamespace(path=other))
    assert fingerprint(config(source), None) != original


def test_a_moved_checkpoint_is_the_same_and_any_changed_file_another(checkpoint: Path, tmp_path: Path) -> None:
    original = of(checkpoint)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    assert of(moved) == original
    for shard in sorted(moved.glob("*.safetensors")):
        weights = load_file(shard)
        for name, value in weights.items():
            save_file({**weights, name: value + torch.ones_like(value)}, shard, {"format": "pt"})
            if not name.startswith(("talker.", "token2wav.")):
                assert of(moved) != original, name
        shutil.copy(checkpoint / shard.name, shard)
    assert of(moved) == original
    (moved / "preprocessor_config.json").write_text("{}")
    assert of(moved) != original
