"""A checkpoint folder, checked from its small files and safetensors headers: no torch, no weights."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from masq.errors import ModelError
from masq.models.refused import refusal_of

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SKIPPED_PREFIXES = ("talker.", "token2wav.")
# The safetensors format allows headers up to this size; a longer one means the file is something else.
MAX_HEADER_BYTES = 100_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: it is missing, or not a JSON object with a model_type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "a checkpoint folder must contain config.json",
            value=folder,
            remedy="give the folder that holds config.json, the safetensors files and the processor's files",
        )
    config = _read_json(path)
    if "model_type" not in config:
        raise ModelError("config.json must name its model_type", value=path, remedy="download the checkpoint again")
    return config


def check(folder: Path, model_types: Collection[str]) -> dict[str, Any]:
    """Check family and files of a checkpoint without reading a weight.

    Args:
        folder: the checkpoint.
        model_types: values of config.json's model_type that the family accepts.

    Returns:
        Its configuration.

    Raises:
        ModelError: a file is missing, truncated or of another kind, the model is one that is refused, the family is
            another one, or the checkpoint is already quantized.
    """
    config = read_config(folder)
    if (refusal := refusal_of(config)) is not None:
        raise ModelError(refusal.rule, value=f"{refusal.value} ({folder})", remedy=refusal.remedy)
    if config["model_type"] not in model_types:
        raise ModelError(
            "the checkpoint must be of the configured family",
            value=f"model_type {config['model_type']!r} in {folder}, expected {' or '.join(sorted(model_types))}",
            remedy="set model.family to match, or give another folder",
        )
    if config.get("quantization_config"):
        raise ModelError(
            "the checkpoint must be a float model",
            value=f"quantization_config in {folder / 'config.json'}",
            remedy="give the unquantized checkpoint",
        )
    headers(folder)
    return config


def headers(folder: Path) -> dict[str, Any]:
    """Safetensors headers of all weight files: tensor name to {"dtype", "shape", "data_offsets"}.

    Raises:
        ModelError: a weight file is missing or truncated, or lacks a tensor that the index promises.
    """
    if (folder / INDEX).is_file():
        return _sharded_headers(folder)
    if (folder / WEIGHTS).is_file():
        return header(folder / WEIGHTS)[0]
    raise ModelError(
        f"a checkpoint folder must contain {WEIGHTS} or {INDEX}",
        value=f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}",
        remedy="download the safetensors files; pickled weights (.bin, .pt) are never read",
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checked folder, by name.

    Raises:
        ModelError: the index is damaged.
    """
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in sorted(set(_weight_map(folder).values()))]


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index must hold a weight_map", value=folder / INDEX, remedy="download it again")
    return weight_map


def _sharded_headers(folder: Path) -> dict[str, Any]:
    weight_map = _weight_map(folder)
    shards = {path.name: header(path)[0] for path in weight_files(folder)}
    absent = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if absent:
        raise ModelError(
            "every tensor of the index must be in its file",
            value=f"{absent[0]} is not in {folder / weight_map[absent[0]]} ({len(absent)} absent in all)",
            remedy="download index and weight files again, from one revision",
        )
    return {name: entry for shard in shards.values() for name, entry in shard.items()}


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of one safetensors file, after checking that all of its data is there, and where the data begin.

    Raises:
        ModelError: the file is missing, truncated or of another format.
    """
    if not path.is_file():
        raise ModelError("every weight file of the index must be there", value=path, remedy="download the missing file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        content = file.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    try:
        entries = json.loads(content)
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            "a weight file must be complete and in the safetensors format",
            value=f"{path}: no readable header in {size} bytes",
            remedy="download it again (a git-lfs pointer is not the file itself)",
        ) from error
    if size != 8 + length + end:
        raise ModelError(
            "a weight file must be complete",
            value=f"{path}: {size} bytes where its header promises {8 + length + end}",
            remedy="download it again",
        )
    return entries, 8 + length


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "a checkpoint's JSON file must be complete and valid", value=f"{path}: {error}", remedy="download it again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError("a checkpoint's JSON file must hold an object", value=path, remedy="download it again")
    return content
