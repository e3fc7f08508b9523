"""A fingerprint of the float model, so that other weights under the same name are another experiment."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from masq.files import sha256_file
from masq.models import checkpoint
from masq.models.zoo import is_trained

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.config import ModelConfig

_SMALL_FILES = (".json", ".txt", ".jinja", ".model")
# Of every tensor, so many bytes at its beginning, in its middle and at its end are read.
_PIECE_BYTES = 4096


def fingerprint(config: ModelConfig, folder: Path | None) -> str:
    """SHA-256 over what is loaded.

    An embedded model is known by the checksums of its files and by the language model inside it (or by its name, where
    it is made from a seed). Of a checkpoint folder it covers every JSON and text file whole, and of each tensor its
    name, type, shape and 4 KiB of values at its beginning, middle and end: whoever changes a weight of a linear,
    merged adapters included, changes all three.

    Args:
        config: the model.
        folder: of the checkpoint, its files checked; None for an embedded model.

    Raises:
        DataError: a file cannot be read.
        ModelError: a weight file is damaged, or the package of an embedded language model is missing.
    """
    if folder is None:
        return _embedded(config.source)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SMALL_FILES):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    for path in checkpoint.weight_files(folder):
        digest.update(f"{path.name}\n".encode())
        digest.update(_tensors(path))
    return digest.hexdigest()


def _embedded(source: str) -> str:
    parts = [source]
    if is_trained(source):
        from masq.models.zoo import smol_omni

        parts += [sha256_file(smol_omni.FOLDER / smol_omni.CHECKSUMS), sha256_file(smol_omni.language_file().path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tensors(path: Path) -> bytes:
    """Digest of the tensors of one safetensors file."""
    header, start = checkpoint.header(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, entry in sorted(header.items()):
            digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
            begin, end = entry["data_offsets"]
            for place in (begin, (begin + end - _PIECE_BYTES) // 2, end - _PIECE_BYTES):
                at = max(begin, place)
                file.seek(start + at)
                digest.update(file.read(min(_PIECE_BYTES, end - at)))
    return digest.digest()
