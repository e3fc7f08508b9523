"""A fingerprint of the float model, so that other weights under the same name are another experiment. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from masq.files import sha256_file
from masq.models import checkpoint

if TYPE_CHECKING:
    from masq.models.config import ModelConfig

# A checkpoint of many gigabytes is read at this many places of each file only.
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16


def fingerprint(config: ModelConfig, folder: Path | None) -> str:
    """SHA-256 over what was loaded.

    An embedded model is known by the checksums of its files (or by its name, where it is made from a seed). Of a
    checkpoint folder it covers every JSON and text file whole, and of each weight file its size, its header and 16
    pieces of 64 KiB spread evenly: training moves all weights, so a changed checkpoint cannot hide between them.

    Args:
        config: the model.
        folder: of the checkpoint, None for an embedded model.

    Raises:
        DataError: a file cannot be read.
        ModelError: a weight file is damaged.
    """
    if folder is None:
        return _embedded(config.source)
    digest = hashlib.sha256()
    small = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".jinja", ".model"))
    for path in small:
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    for path in checkpoint.weight_files(folder):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(_pieces(path))
    return digest.hexdigest()


def _embedded(source: str) -> str:
    listing = Path(__file__).parent / "zoo" / f"{source.partition(':')[2]}_files" / "SHA256SUMS"
    return sha256_file(listing) if listing.is_file() else hashlib.sha256(source.encode()).hexdigest()


def _pieces(path: Path) -> bytes:
    """Digest of pieces at equal distances; the first one holds the header, or its beginning."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
