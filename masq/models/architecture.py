"""Sizes of a language model from configuration alone: no weight is read and torch is not imported."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from masq.errors import ConfigError, DataError, ModelError
from masq.files import read_json
from masq.models.config import Architecture, ModelConfig

_TOWERS = ("visual.", "vision_tower.", "audio_tower.", "multi_modal_projector.", "image_newline")


def architecture(model: ModelConfig) -> Architecture:
    """Sizes of the language model: those of a local checkpoint, else those of the configuration.

    Raises:
        ConfigError: neither is known.
        ModelError: a local checkpoint folder is missing or holds no readable config.json.
    """
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        return _read_architecture(folder)
    if model.source.startswith(("/", "./", "../", "~")):
        raise ModelError("model.source must be an existing folder", value=model.source, remedy="check the path")
    if model.architecture is None:
        raise ConfigError(
            "masq plan needs the sizes of the model",
            value=f"model.source={model.source}",
            remedy="give model.architecture, or a local checkpoint folder as model.source",
        )
    return model.architecture


def linear_shapes(sizes: Architecture) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear of a block by role."""
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_heads
    d, queries, keys = sizes.hidden_size, sizes.num_heads * head_dim, sizes.num_kv_heads * head_dim
    return {
        "query": (queries, d),
        "key": (keys, d),
        "value": (keys, d),
        "output": (d, queries),
        "gate": (sizes.intermediate_size, d),
        "up": (sizes.intermediate_size, d),
        "down": (d, sizes.intermediate_size),
    }


def count_parameters(sizes: Architecture) -> dict[str, int]:
    """Parameters by part: weights, q, k, v biases and norms of the blocks, embedding and head, towers."""
    shapes = linear_shapes(sizes)
    head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_heads
    biases = sum(shapes[role][0] for role in ("query", "key", "value")) if sizes.qkv_bias else 0
    norms = 2 * sizes.hidden_size + (2 * head_dim if sizes.qk_norm else 0)
    block = sum(a * b for a, b in shapes.values()) + biases + norms
    embedding = sizes.vocab_size * sizes.hidden_size
    return {
        "decoder": sizes.num_layers * block + sizes.hidden_size,
        "embedding": embedding if sizes.tied_embeddings else 2 * embedding,
        "towers": sizes.tower_parameters,
    }


def input_sizes(architecture: Architecture, roles: tuple[str, ...]) -> list[int]:
    """Sorted distinct d_in of the linears in ``roles``."""
    head_dim = architecture.head_dim or architecture.hidden_size // architecture.num_heads
    special = {"output": architecture.num_heads * head_dim, "down": architecture.intermediate_size}
    return sorted({special.get(role, architecture.hidden_size) for role in roles})


def _read_architecture(folder: Path) -> Architecture:
    try:
        plain = read_json(folder / "config.json")
    except DataError as error:
        raise ModelError(
            "a checkpoint folder needs a readable config.json",
            value=error.value,
            remedy=f"check the folder {folder}",
        ) from error
    if not isinstance(plain, dict):
        raise ModelError(f"{folder / 'config.json'} must be a JSON object", value=type(plain).__name__)
    outer = plain.get("thinker_config", plain)
    text: dict[str, Any] = outer.get("text_config", outer)
    tensors = [(name, shape) for path in sorted(folder.glob("*.safetensors")) for name, shape in _tensors(path)]
    try:
        return Architecture(
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            head_dim=text.get("head_dim"),
            tower_parameters=sum(math.prod(shape) for name, shape in tensors if _is_of_tower(name)),
            tied_embeddings=bool(text.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))),
            qkv_bias=bool(text.get("attention_bias", True)),
            qk_norm=any(name.endswith(".q_norm.weight") and not _is_of_tower(name) for name, _ in tensors),
        )
    except KeyError as error:
        raise ModelError(
            f"{folder / 'config.json'} does not give the sizes of a language model", value=f"no {error.args[0]}"
        ) from error


def _is_of_tower(name: str) -> bool:
    """Whether a tensor is of the vision or audio tower, or writes what comes out of it."""
    return any(part in name for part in _TOWERS) and not name.startswith(("talker.", "token2wav."))


def _tensors(path: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of the tensors in one shard, from its header alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise ModelError(
            "a safetensors file must be complete", value=path.name, remedy="fetch the checkpoint again"
        ) from error
    return [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
