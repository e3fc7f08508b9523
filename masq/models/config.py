"""Which model, from where, in which precision. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from masq.errors import ConfigError
from masq.models.refused import REFUSED, REFUSED_FAMILIES

RESIDENT_SHARE = 0.5
"""Weights that would take more of the free memory are streamed where the machine decides."""
ModalityName = Literal["text", "vision", "audio"]

Family = Literal[
    "internvl",
    "llava_onevision",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen3_vl",
    # Known, and refused with the reason.
    "minicpm_v",
    "qwen3_omni_moe",
]

TAKES: dict[str, tuple[ModalityName, ...]] = {
    "internvl": ("text", "vision"),
    "llava_onevision": ("text", "vision"),
    "qwen2_5_omni": ("text", "vision", "audio"),
    "qwen2_5_vl": ("text", "vision"),
    "qwen2_audio": ("text", "audio"),
    "qwen3_vl": ("text", "vision"),
}
"""What each family takes, as its adapter says."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of the language model, so that ``masq plan`` can count before any weight is read.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        intermediate_size: width inside the MLP.
        vocab_size: rows of the embedding.
        head_dim: size of a head, ``hidden_size / num_heads`` if None.
        tower_parameters: parameters of the vision and audio towers and their projectors together.
        tied_embeddings: whether the head is the embedding.
        qkv_bias: whether query, key and value have biases.
        qk_norm: whether each head's query and key are normed.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int | None = None
    tower_parameters: int = 0
    tied_embeddings: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False

    def __post_init__(self) -> None:
        """Reject impossible sizes.

        Raises:
            ConfigError: a size is not positive, or heads do not divide.
        """
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", value=getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads must divide num_heads", value=f"{self.num_kv_heads} does not divide {self.num_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                "num_heads must divide hidden_size where head_dim is not given",
                value=f"{self.num_heads} does not divide {self.hidden_size}",
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model to load.

    Attributes:
        name: shown in tables and folder names.
        family: which adapter understands it.
        source: ``zoo:NAME`` for an embedded model, a checkpoint folder, or a hub id.
        modalities: what it understands; text is always among them.
        dtype: precision of the float model.
        device: torch device, for example ``cpu`` or ``cuda:0``.
        attention: attention implementation of transformers.
        revision: hub revision, None for the default one.
        trust_remote_code: run code that comes with a checkpoint; off unless asked for.
        min_pixels: lower pixel budget of an image, None for the processor's own. Scores move with it.
        max_pixels: upper pixel budget of an image, None for the processor's own. Scores move with it.
        weights: ``resident`` keeps all weights in memory, ``streamed`` reads each block from disk when it is its turn,
            ``auto`` streams where the weights would take more than half of the memory that is free. Changes no result.
        architecture: sizes for ``masq plan``; None reads them from the checkpoint folder.
    """

    name: str
    family: Family
    source: str
    modalities: tuple[ModalityName, ...]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str = "cpu"
    attention: Literal["sdpa", "eager"] = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    weights: Literal["resident", "streamed", "auto"] = "resident"
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        """Reject impossible models.

        Raises:
            ConfigError: a family that is refused, an empty name or source, missing text, modalities that are repeated
                or that the family does not take, or a reversed pixel budget.
        """
        if not self.name or not self.source:
            raise ConfigError("name and source must not be empty", value=f"name={self.name!r}, source={self.source!r}")
        if "text" not in self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ConfigError("modalities must contain text, and each once", value=list(self.modalities))
        if self.family in REFUSED_FAMILIES:
            refusal = REFUSED[REFUSED_FAMILIES[self.family]]
            raise ConfigError(refusal.rule, value=refusal.value, remedy=refusal.remedy)
        lacking = [name for name in self.modalities if name not in TAKES[self.family]]
        if lacking:
            raise ConfigError(
                f"a {self.family} model has no {' and no '.join(lacking)}",
                value=list(self.modalities),
                remedy="use a qwen2_5_omni model",
            )
        for name in ("min_pixels", "max_pixels"):
            pixels = getattr(self, name)
            if pixels is not None and pixels < 1:
                raise ConfigError(f"{name} must be positive", value=pixels)
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError("min_pixels must not exceed max_pixels", value=f"{self.min_pixels} > {self.max_pixels}")
