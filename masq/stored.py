"""How many bits a quantized model would store, from configuration alone: what `effective_bits` of its record will say.

No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from masq.config import RunConfig, active_modalities
from masq.models.architecture import linear_shapes
from masq.models.config import Architecture
from masq.numerics.scheme import GROUP_ROLES, GroupName, LinearFormat
from masq.transforms.config import LearnedSharedSmoothing, SearchedSmoothing, SharedSmoothing

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Stored:
    """Of the linears of all decoder blocks.

    Attributes:
        num_weights: their elements.
        num_quantized: those of the quantized ones.
        code_bits: bits of integer codes.
        bits: bits of everything, scales, smoothing, adapters and linears left in float included.
    """

    num_weights: int = 0
    num_quantized: int = 0
    code_bits: float = 0.0
    bits: float = 0.0

    def __add__(self, other: Stored) -> Stored:
        """Add up two parts of a model."""
        return Stored(
            self.num_weights + other.num_weights,
            self.num_quantized + other.num_quantized,
            self.code_bits + other.code_bits,
            self.bits + other.bits,
        )

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight element, everything counted."""
        return self.bits / self.num_weights


def stored(config: RunConfig, sizes: Architecture) -> Stored:
    """Count what the linears of all blocks would take, block by block as overrides have it."""
    total = Stored()
    for index in range(sizes.num_layers):
        formats = {} if config.method.is_float else config.scheme.for_block(index, sizes.num_layers).formats
        total += _block(config, formats, linear_shapes(sizes))
    return total


def _block(config: RunConfig, formats: Mapping[str, LinearFormat], shapes: dict[str, tuple[int, int]]) -> Stored:
    method, others = config.method, len(active_modalities(config)) - 1
    smoothed = {role for group in _smoothed_groups(config, formats) for role in GROUP_ROLES[group]}
    num_quantized, code_bits, rest = 0, 0.0, 0.0
    for role, (d_out, d_in) in shapes.items():
        if role not in formats:
            rest += d_out * d_in * 8 * DTYPE_BYTES[config.model.dtype]
            continue
        weight = formats[role].weight
        # Where the modalities share their factor, they share their weight too.
        copies = 1 + others if method.stores_weight_per_modality and role in smoothed else 1
        groups = d_in // weight.group_size if weight.group_size else 1
        num_quantized += d_out * d_in
        code_bits += copies * d_out * d_in * weight.bits
        # Float32 scales, and zero points of a byte where the format has them.
        rest += copies * d_out * groups * (32 if weight.symmetric else 40)
    rest += 32 * _smoothing_elements(config, formats, shapes) + 8 * others * _adapter_bytes(config, formats, shapes)
    return Stored(sum(a * b for a, b in shapes.values()), num_quantized, code_bits, code_bits + rest)


def _smoothed_groups(config: RunConfig, formats: Collection[str]) -> list[GroupName]:
    smoothing = config.method.smoothing
    groups: tuple[GroupName, ...] = () if smoothing.kind == "none" else smoothing.groups
    return [group for group in groups if set(GROUP_ROLES[group]) & set(formats)]


def _smoothing_elements(config: RunConfig, formats: Collection[str], shapes: dict[str, tuple[int, int]]) -> int:
    """Factors of one block that are kept at run time; folded ones cost nothing."""
    smoothing, rows = config.method.smoothing, 1
    groups: list[GroupName] = _smoothed_groups(config, formats)
    if isinstance(smoothing, SharedSmoothing | SearchedSmoothing):
        kept: tuple[GroupName, ...] = ("down",) if smoothing.fold else smoothing.groups
        groups = [group for group in groups if group in kept]
    elif not isinstance(smoothing, LearnedSharedSmoothing):
        rows = len(active_modalities(config))
    return rows * sum(shapes[GROUP_ROLES[group][0]][1] for group in groups)


def _adapter_bytes(config: RunConfig, formats: Collection[str], shapes: dict[str, tuple[int, int]]) -> int:
    """Bytes of the low-rank factors of one block and one modality."""
    compensation, elements, scales = config.method.compensation, 0, 0
    if compensation.kind == "none":
        return 0
    for role in [role for group in compensation.groups for role in GROUP_ROLES[group] if role in formats]:
        rank = compensation.rank
        if rank is None:
            rank = int((compensation.rank_ratio or 0) * min(shapes[role]))
        elements += rank * sum(shapes[role])
        scales += rank
    # Codes in a byte each, and a float32 scale for each component.
    return elements + 4 * scales if compensation.dtype == "int8" else elements * DTYPE_BYTES[compensation.dtype]
