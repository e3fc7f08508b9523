"""What a wheel carries, and that its configurations and models are found where the code looks for them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout by the installed backend: no network, no isolation."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'masq[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tracked(pattern: str, folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def test_every_config_is_in_the_package(names: set[str]) -> None:
    expected = {f"masq/{name}" for name in tracked("*.yaml", "conf")}
    assert "masq/conf/run.yaml" in expected
    assert expected <= names


@pytest.mark.parametrize(
    "pattern", ["*.py", "*.cpp", "*.cu", "*.h", "*.parquet", "*.safetensors", "*.json", "*.md", "SHA256SUMS", "*.txt"]
)
def test_code_and_model_files_are_in_the_package(names: set[str], pattern: str) -> None:
    assert tracked(pattern, "masq") <= names


def test_the_package_carries_nothing_else(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"masq"}
    assert not [name for name in names if name.endswith((".pyc", ".pkl", ".pt", ".bin"))]


def test_console_script_and_metadata(wheel: Path, names: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        scripts = next(name for name in names if name.endswith("entry_points.txt"))
        assert "masq = masq.cli:main" in archive.read(scripts).decode()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert re.search(r"^Requires-Python: .*>=3\.11", text, re.MULTILINE)
    assert "License-Expression: Apache-2.0" in text
    core = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not re.search("hydra|omegaconf|lm-eval|wandb", "\n".join(core))


def test_an_installed_wheel_composes_its_configs(wheel: Path, tmp_path: Path) -> None:
    """Unpacked, as an installer does it, without the checkout on the path: ``masq plan`` finds its configs."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "masq", "plan", "model=nano_omni", "method=rtn"]
    answer = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "rtn" in answer.stdout


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    lines = [line for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.!+]+", line) for line in lines)
    tested = {line.split("==")[0] for line in lines}
    assert {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in listed} <= tested
