"""Stored bits of a quantized model: what `effective_bits` in a record means, simulated or packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from masq.models.base import GROUPS, Role
from masq.modules.packed_linear import PackedLinear
from masq.modules.quant_linear import QuantLinear
from masq.numerics.packing import ZERO_POINT_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from masq.models.base import BlockAdapter


@dataclass(frozen=True)
class Footprint:
    """Bits stored for the decoder linears, by what they hold.

    Attributes:
        num_weights: number of weight elements of the linears, quantized or not.
        codes: bits of the weight integers (or of the float weights of unquantized linears).
        scales: bits of scales and zero points.
        smoothing: bits of the smoothing vectors, once per shared input.
        adapters: bits of the low-rank corrections.
        centres: bits of the centres, once per shared input, and of the biases by modality that they need.
    """

    num_weights: int = 0
    codes: int = 0
    scales: int = 0
    smoothing: int = 0
    adapters: int = 0
    centres: int = 0

    @property
    def effective_bits(self) -> float:
        """Stored bits per weight element, everything counted."""
        return (self.codes + self.scales + self.smoothing + self.adapters + self.centres) / max(self.num_weights, 1)

    def __add__(self, other: Footprint) -> Footprint:
        """Add up two footprints."""
        return Footprint(
            self.num_weights + other.num_weights,
            self.codes + other.codes,
            self.scales + other.scales,
            self.smoothing + other.smoothing,
            self.adapters + other.adapters,
            self.centres + other.centres,
        )

    def to_dict(self) -> dict[str, float]:
        """The `effective_bits` part of a record, in bits per weight element."""
        count = max(self.num_weights, 1)
        centres = {"centres": self.centres / count} if self.centres else {}
        return {
            "total": self.effective_bits,
            "codes": self.codes / count,
            "scales": self.scales / count,
            "smoothing": self.smoothing / count,
            "adapters": self.adapters / count,
            **centres,
            "adapter_bytes": self.adapters / 8,
            "num_weights": self.num_weights,
        }


def footprint(blocks: Iterable[BlockAdapter]) -> Footprint:
    """Footprint of the decoder linears of ``blocks``."""
    total = Footprint()
    for block in blocks:
        for roles in GROUPS.values():
            for position, role in enumerate(roles):
                total += _linear_footprint(block.linear(Role(role)), counts_shared=position == 0)
    return total


def footprint_of(linears: Iterable[nn.Module]) -> Footprint:
    """Footprint of linears that share no input."""
    return sum((_linear_footprint(linear, counts_shared=True) for linear in linears), Footprint())


def _linear_footprint(linear: nn.Module, *, counts_shared: bool) -> Footprint:
    """Footprint of one linear; the linears of a group share smoothing and centres, counted at the first."""
    if not isinstance(linear, QuantLinear | PackedLinear):
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        return Footprint(num_weights=weight.numel(), codes=weight.numel() * weight.element_size() * 8)
    state = linear.state_dict()
    bits = {name: tensor.numel() * tensor.element_size() * 8 for name, tensor in state.items()}
    num_weights = linear.in_features * linear.out_features
    copies = len(linear.weight_modalities) if isinstance(linear, QuantLinear) else 1
    zero_points = sum(tensor.numel() for name, tensor in state.items() if name.startswith("zero_point"))
    return Footprint(
        num_weights=num_weights,
        codes=copies * num_weights * linear.weight_format.bits,
        scales=sum(size for name, size in bits.items() if name.startswith("scale")) + ZERO_POINT_BITS * zero_points,
        smoothing=bits.get("inverse_smoothing", 0) if counts_shared else 0,
        adapters=sum(size for name, size in bits.items() if name.startswith(("left_", "right_", "factor_scale_"))),
        centres=(bits["bias"] + (bits["centre"] if counts_shared else 0)) if "centre" in bits else 0,
    )
