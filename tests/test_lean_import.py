"""Configuration, command line and records answer at once: what they import is light, and nothing touches CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import masq

ROOT = Path(masq.__file__).parent
HEAVY = ("torch", "transformers", "lm_eval", "lmms_eval", "wandb", "triton", "scipy", "pandas")
EDGE = ("hydra", "omegaconf")
OF_HARNESSES = (
    "masq.evaluation.benchmark_tasks",
    "masq.evaluation.language",
    "masq.evaluation.multimodal",
    "masq.evaluation.local.",
    "masq.plugin",
)
FILES = [
    "errors.py",
    "files.py",
    "registry.py",
    "decoding.py",
    "config.py",
    "plan.py",
    "inputs.py",
    "run.py",
    "doctor.py",
    "cli.py",
    "numerics/scheme.py",
    "transforms/config.py",
    "rounding/config.py",
    "compensation/config.py",
    "models/config.py",
    "calibration/config.py",
    "evaluation/config.py",
]


def lean_modules() -> list[str]:
    """All packages, the records' room, and the torch-free files."""
    paths = {*ROOT.rglob("__init__.py"), *(ROOT / "report").glob("*.py"), *(ROOT / name for name in FILES)}
    names = (".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names)


def imported_by(modules: list[str], watched: tuple[str, ...]) -> set[str]:
    """Which of ``watched`` a fresh interpreter holds after importing each of ``modules``, and what brought it in."""
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    for heavy in {watched!r}:
        if heavy in sys.modules:
            print(name, "imports", heavy)
            sys.exit()
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.splitlines())


def test_torch_free_modules_import_nothing_heavy() -> None:
    assert imported_by(lean_modules(), HEAVY) == set()


def test_hydra_is_not_imported_before_the_command_line_needs_it() -> None:
    assert imported_by(lean_modules(), EDGE) == set()


def test_the_check_itself_notices() -> None:
    assert imported_by(["masq", "json"], ("json",)) != set()


def every_module() -> list[str]:
    """All but the two sides of the harnesses: what scores tasks cannot do without them."""
    names = (".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py"))
    own = (name for name in names if not name.endswith(("__init__", "__main__")))
    return sorted(name for name in own if not name.startswith(OF_HARNESSES))


def test_no_module_brings_in_optional_packages_or_starts_cuda() -> None:
    """The library with all its rooms runs where Hydra, the harnesses and wandb are not installed."""
    script = f"""
import importlib, sys
for name in ("hydra", "omegaconf", "lm_eval", "lmms_eval", "wandb"):
    sys.modules[name] = None  # an import of it raises ImportError
for name in {every_module()!r}:
    importlib.import_module(name)
import torch
sys.exit(torch.cuda.is_initialized())
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", FILES)
def test_the_list_of_torch_free_files_is_up_to_date(name: str) -> None:
    assert (ROOT / name).exists()
