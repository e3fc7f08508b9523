"""``masq export``: from a finished run to a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from masq.cli import main
from masq.export import checkpoint
from masq.finished import load_finished
from masq.models.zoo import nano
from masq.run import run
from tests.test_run import config, splits  # noqa: F401


def finished(splits: dict[str, Path], root: Path, method: str, **changes: object) -> tuple[Path, str]:  # noqa: F811
    evaluation = {"score": False, "samples_per_task": 1, "source": str(splits["evaluation"])}
    record = run(config(splits, root, method, evaluation=evaluation, **changes))
    return next(root.glob(f"*-{record.identity[:10]}")), record.identity


def test_a_run_becomes_a_checkpoint(splits, tmp_path, capsys):  # noqa: F811
    folder, identity = finished(splits, tmp_path, "masquant")
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out)]) == 0
    assert "out" in capsys.readouterr().out
    made_by = checkpoint.check(out).made_by
    assert made_by | {"run": identity, "method": "masquant", "scheme": "w4a6", "model": "nano_omni"} == made_by
    adapter = load_finished(folder)
    batch = adapter.encode(nano.random_samples(("vision", "audio"), 2), with_answer=False)
    loaded = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        found, wanted = loaded(**batch.inputs).logits, adapter.model(**batch.inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert main(["export", str(folder), str(out)]) == 2
    assert "never overwrites" in capsys.readouterr().err


def test_what_cannot_be_exported_says_why(splits, tmp_path, capsys):  # noqa: F811
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    folder, _ = finished(splits, tmp_path, "mas")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "one stored weight for all modalities" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 2
    assert "a weight per modality" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_w8a8_for_other_engines(splits, tmp_path):  # noqa: F811
    folder, _ = finished(splits, tmp_path, "smoothquant", scheme="w8a8")
    assert main(["export", str(folder), str(tmp_path / "out"), "--format", "compressed-tensors"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_on_a_kernel_is_exported_without_one(splits, tmp_path, monkeypatch):  # noqa: F811
    folder, _ = finished(splits, tmp_path, "masquant", execution="packed")
    checkpoint.save(load_finished(folder), tmp_path / "from-kernels", {})
    monkeypatch.setattr("masq.modules.stack.select", lambda *_: pytest.fail("asked for a kernel"))
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "from-kernels"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
