"""Tensors and a JSON note in one checked safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from masq.errors import DataError
from masq.files import atomic_write_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``note``; a reader sees the whole file or none."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(note)
    atomic_write_bytes(path, save(contiguous, metadata={"note": text, "sha256": _digest(contiguous, text)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Read what ``save_tensors`` wrote, None where there is no file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # Mapped tensors lie at any byte; CPU kernels round differently on unaligned ones, a copy is aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(tensors, metadata["note"]):
            raise ValueError("its checksum does not fit")
        return tensors, json.loads(metadata["note"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            "a checkpoint must be a complete, undamaged safetensors file",
            value=path.name,
            remedy="delete it; its content is computed again",
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], note: str) -> str:
    """SHA-256 of names, types, shapes and bytes, and of the note."""
    digest = hashlib.sha256(note.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
