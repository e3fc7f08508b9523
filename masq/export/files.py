"""A packed checkpoint on disk, checked before anything is built from it: headers, names, shapes, checksums.

No tensor is made and no code is run: JSON and the header of safetensors files are parsed here, the rest is hashed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masq.errors import ModelError
from masq.export.description import Description
from masq.files import canonical_hash
from masq.models.checkpoint import INDEX, MAX_HEADER_BYTES, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = "config.json"
LISTING = "masq_tensors"
"""Key of a weight file's metadata: every tensor's [dtype, shape, sha256], as JSON."""
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_MAX_CONFIG_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 22
_NUM_THREADS = 4
_FILE_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# What transformers sets when it saves: the rest of config.json is what its checksum is about.
_VOLATILE = ("quantization_config", "architectures", "dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: that holds it.
        dtype: as safetensors writes it.
        shape: its sizes.
        start: its first byte in the file.
        num_bytes: of its content.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def check(folder: Path) -> Description:
    """Check a packed checkpoint to the last byte of its configuration and weights.

    Args:
        folder: with ``config.json`` and the weight files.

    Returns:
        What it says of itself.

    Raises:
        ModelError: something is missing, damaged, of another version, or does not belong together.
    """
    config = read_config(folder)
    description = Description.from_dict(config["quantization_config"])
    if description.config_sha256 != config_digest(config):
        raise _error("config.json must be as it was exported", "its checksum does not fit")
    tensors, listing = read_headers(folder)
    if tensors_digest(listing) != description.tensors_sha256:
        raise _error("the weight files must belong to config.json", "the checksum of their listing does not fit")
    _check_listing(tensors, listing)
    _check_described(tensors, description)
    _check_content(tensors, listing)
    return description


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, a JSON object with a ``quantization_config``.

    Raises:
        ModelError: it is missing, too large, not JSON, or not of a quantized model.
    """
    path = folder / CONFIG
    config = parse(_read(path, _MAX_CONFIG_BYTES), path.name)
    if "quantization_config" not in config:
        raise _error("config.json of a packed checkpoint has a quantization_config", "none")
    return config


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of all of ``config.json`` that does not change when transformers saves the model again.

    Raises:
        ModelError: a number that JSON has not.
    """
    try:
        return canonical_hash({key: value for key, value in config.items() if key not in _VOLATILE})
    except (ValueError, RecursionError) as error:
        raise _error("config.json must be plain JSON", error) from error


def tensors_digest(listing: Mapping[str, Any]) -> str:
    """SHA-256 of a listing of tensors."""
    return canonical_hash(listing)


def listing_text(listing: Mapping[str, Any]) -> str:
    """A listing as the metadata of a weight file hold it."""
    return json.dumps(listing, separators=(",", ":"), sort_keys=True)


def read_headers(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """Every tensor of the weight files, and the listing that each file holds.

    Raises:
        ModelError: a file is missing, incomplete or has a header that is not in the safetensors format, the index does
            not fit, or the listings differ.
    """
    tensors: dict[str, StoredTensor] = {}
    listing: dict[str, Any] | None = None
    for path in _weight_files(folder):
        own, metadata = _header(path)
        found = parse(metadata.get(LISTING, "").encode(), f"{LISTING} of {path.name}")
        if listing is not None and found != listing:
            raise _error("all weight files must be of one checkpoint", path.name)
        if own.keys() & tensors.keys():
            raise _error("a tensor is stored once", sorted(own.keys() & tensors.keys())[0])
        tensors, listing = {**tensors, **own}, found
    _check_index(folder, tensors)
    return tensors, listing or {}


def _weight_files(folder: Path) -> list[Path]:
    """The weight files in the order of their names; only plain names in the folder itself."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    names = _weight_map(folder).values()
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise _error(f"{INDEX} names model-NNNNN-of-NNNNN.safetensors files", str(name)[:60])
    return [folder / name for name in sorted(set(names))]


def _weight_map(folder: Path) -> dict[str, Any]:
    weight_map = parse(_read(folder / INDEX, MAX_HEADER_BYTES), INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _error(f"{INDEX} must hold a weight_map", type(weight_map).__name__)
    return weight_map


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder)
        if weight_map != {name: tensor.file.name for name, tensor in tensors.items()}:
            raise _error(f"{INDEX} must list the tensors of the weight files", "another list")


def _header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, whose tensors fill it without gap or overlap."""
    size = _size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _error(f"{path.name} must be a complete safetensors file", f"a header of {length} in {size} bytes")
        content = parse(file.read(length), f"the header of {path.name}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(f"the metadata of {path.name} must be texts", type(metadata).__name__)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in content.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if tensor.start != end:
            raise _error(f"tensors of {path.name} must follow each other", f"{name} at {tensor.start}, not {end}")
        end += tensor.num_bytes
    if end != size:
        raise _error(f"{path.name} must be complete", f"{size} bytes where its header promises {end}")
    return tensors, metadata


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    """One entry of a header, its type, shape and place consistent."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _error(f"{name} in {path.name} must have dtype, shape and data_offsets", "others")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _error(f"{name} must have a dtype of {', '.join(ITEM_BYTES)}", str(dtype)[:60])
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _error(f"shape and data_offsets of {name} must be counts", str((shape, offsets))[:60])
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise _error(f"{name} must have the bytes of its shape", f"{offsets[1] - offsets[0]}, not {num_bytes}")
    return StoredTensor(path, dtype, tuple(shape), data + offsets[0], num_bytes)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _check_listing(tensors: Mapping[str, StoredTensor], listing: Mapping[str, Any]) -> None:
    """Names, dtypes and shapes are those of the listing."""
    for kind, names in (("missing", listing.keys() - tensors.keys()), ("unknown", tensors.keys() - listing.keys())):
        if names:
            raise _error(f"no tensor may be {kind}", sorted(names)[0])
    for name, tensor in tensors.items():
        entry = listing[name]
        if not isinstance(entry, list) or entry[:2] != [tensor.dtype, list(tensor.shape)] or len(entry) != 3:
            raise _error(f"{name} must be as listed", f"{tensor.dtype} {list(tensor.shape)}")


def _check_described(tensors: Mapping[str, StoredTensor], description: Description) -> None:
    """The tensors of quantized linears are those that the formats ask for, and no others."""
    wanted = description.tensors()
    for name, (dtype, shape) in wanted.items():
        found = tensors.get(name)
        if found is None:
            raise _error("every tensor that config.json describes must be stored", name)
        if found.dtype != dtype or (shape is not None and found.shape != shape):
            raise _error(f"{name} must be {dtype} {shape}", f"{found.dtype} {found.shape}")
    for name in tensors:
        if name.rpartition(".")[0] in description.linears and name not in wanted:
            raise _error("a quantized linear holds only what config.json describes", name)


def _check_content(tensors: Mapping[str, StoredTensor], listing: Mapping[str, Any]) -> None:
    """The bytes of every tensor are those that were exported; hashing runs in a few threads."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for name, digest in zip(tensors, pool.map(_digest, tensors.values()), strict=True):
            if digest != listing[name][2]:
                raise _error(f"the content of {name} must be as exported", "its checksum does not fit")


def _digest(tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.num_bytes
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _error(f"{path.name} must be in the folder", error.strerror) from error


def _read(path: Path, limit: int) -> bytes:
    if _size(path) > limit:
        raise _error(f"{path.name} has at most {limit} bytes", path.stat().st_size)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _error(f"{path.name} must be readable", error.strerror) from error


def parse(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: it is none.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _error(f"{name} must be complete JSON", str(error)[:60]) from error
    if not isinstance(parsed, dict):
        raise _error(f"{name} must hold a JSON object", type(parsed).__name__)
    return parsed


def _error(rule: str, value: object) -> ModelError:
    return ModelError(rule, value=value, remedy="the checkpoint is damaged: copy it again, or export the run again")
