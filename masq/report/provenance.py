"""Where numbers come from: code, libraries, machine, seeds, data. No user, host or folder names."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import masq

if TYPE_CHECKING:
    from collections.abc import Mapping

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pillow",
    "soundfile",
    "gguf",
    "jiwer",
    "triton",
    "hydra-core",
    "omegaconf",
    "lm-eval",
    "lmms-eval",
    "wandb",
)


def provenance(
    seed: int, data_hashes: Mapping[str, str], *, device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """What one needs to know to run the same thing again.

    Args:
        seed: seed of the run.
        data_hashes: split -> SHA-256 of its samples, and ``model`` -> fingerprint of the float weights.
        device: torch device of the run.
        threads: threads of one operation; None asks torch.

    Returns:
        JSON: ``masq``, ``commit`` and ``dirty`` (null outside a git checkout), ``libraries`` (null where absent),
        ``python``, ``platform``, ``device``, ``device_name``, ``threads``, ``seed``, ``data``, ``started`` (UTC) and
        ``finished`` (null until the record is finished or failed).
    """
    commit, dirty = code_version()
    return {
        "masq": library_version("masq"),
        "commit": commit,
        "dirty": dirty,
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "device_name": device_name(device),
        "threads": torch_threads() if threads is None else threads,
        "seed": seed,
        "data": dict(data_hashes),
        "started": utc_now(),
        "finished": None,
    }


def utc_now() -> str:
    """The time now, ISO 8601 in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def library_version(name: str) -> str | None:
    """Installed version of a distribution, None when it is absent; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_version(folder: Path | None = None) -> tuple[str | None, bool | None]:
    """Commit of the code that runs, and whether ``masq/`` or ``conf/`` differ from it.

    Args:
        folder: the checkout; None takes the folder that holds the package.

    Returns:
        (None, None) when the package is not imported from the top of a git checkout, or git is not there.
    """
    root = Path(masq.__file__).resolve().parents[1] if folder is None else folder
    top = _git(root, "rev-parse", "--show-toplevel")
    # An environment may lie inside somebody else's checkout, whose commit says nothing about masq.
    if top is None or Path(top).resolve() != root.resolve():
        return None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(root, "status", "--porcelain", "--", "masq", "conf")
    return commit, None if changes is None else bool(changes)


def device_name(device: str) -> str:
    """Product name of the processor or GPU behind a torch device such as "cpu" or "cuda:0"."""
    if device.startswith("cuda"):
        import torch

        try:
            return torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError):
            # Whether the device exists is for loading to find out and explain.
            return device
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def cpu_info() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where that file is absent."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def torch_threads() -> int:
    """Threads torch uses inside one operation."""
    import torch

    return torch.get_num_threads()


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, None when git is absent or refuses."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
