"""Integer weights as they are stored: two codes a byte at up to 4 bits, exact both ways.

The stored layout is row-wise and plain, so that a checkpoint favours no machine: a kernel rearranges it when it is
loaded (``masq.kernels``).

Shapes: O output channels, I input channels, G groups of input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import NumericalError
from masq.numerics.affine import QuantizedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.numerics.scheme import TensorFormat

NIBBLE_BITS = 4
"""Codes of at most so many bits take half a byte each, wider ones a byte."""
ZERO_POINT_BITS = 8
"""Stored bits of a zero point, whatever the width of the codes."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [O, I] in its stored layout.

    Attributes:
        codes: at up to 4 bits uint8 [O, ceil(I / 2)], column 2j in the low half of byte j and column 2j + 1 in the
            high half, symmetric codes in two's complement, an odd I padded with a zero; else [O, I], int8 if
            symmetric and uint8 otherwise.
        scale: float32 [O, G].
        zero_point: uint8 [O, G], None if the format is symmetric.
        format: what the codes mean.
        in_features: I.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: TensorFormat
    in_features: int

    def __post_init__(self) -> None:
        """Refuse tensors that do not belong together.

        Raises:
            NumericalError: a dtype or shape that the format does not have.
        """
        halves = self.format.bits <= NIBBLE_BITS
        dtype = torch.int8 if self.format.symmetric and not halves else torch.uint8
        columns = (self.in_features + 1) // 2 if halves else self.in_features
        size = self.format.group_size or self.in_features
        groups = (self.codes.shape[0], self.in_features // size if size else 1)
        zero = self.zero_point
        wrong = (
            self.codes.dtype != dtype
            or self.codes.shape[1:] != (columns,)
            or self.scale.dtype != torch.float32
            or self.scale.shape != groups
            or (zero is None) != self.format.symmetric
            or (zero is not None and (zero.dtype != torch.uint8 or zero.shape != groups))
        )
        if wrong:
            raise NumericalError(
                f"a packed weight of {self.in_features} inputs in this format needs codes {dtype} [O, {columns}] and "
                f"scales [O, {groups[1]}]",
                value=f"codes {self.codes.dtype} {tuple(self.codes.shape)}, scale {self.scale.dtype} "
                f"{tuple(self.scale.shape)}, zero point {zero if zero is None else (zero.dtype, tuple(zero.shape))}",
                remedy="make it with masq.numerics.packing.pack",
            )

    @property
    def out_features(self) -> int:
        """O."""
        return self.codes.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        tensors = [self.codes, self.scale, *([] if self.zero_point is None else [self.zero_point])]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack(weight: QuantizedTensor) -> PackedWeight:
    """Store codes [O, I] in as few bytes as the format allows; ``unpack`` gives them back bit for bit."""
    codes = weight.codes
    return PackedWeight(
        codes=pack_nibbles(codes) if weight.format.bits <= NIBBLE_BITS else codes.contiguous(),
        scale=weight.scale.contiguous(),
        zero_point=None if weight.zero_point is None else weight.zero_point.to(torch.uint8),
        format=weight.format,
        in_features=codes.shape[1],
    )


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The codes of a stored weight, as ``masq.numerics.affine.quantize`` made them."""
    codes, fmt = weight.codes, weight.format
    if fmt.bits <= NIBBLE_BITS:
        codes = unpack_nibbles(codes, weight.in_features, signed=fmt.symmetric)
    zero_point = None if weight.zero_point is None else weight.zero_point.float()
    return QuantizedTensor(codes, weight.scale, zero_point, fmt)


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one format that read the same input as one, [sum of O, I], in their order.

    Raises:
        NumericalError: none, or formats or input sizes differ.
    """
    if len({(one.format, one.in_features) for one in weights}) != 1:
        raise NumericalError(
            "weights can be stacked when they have one format and one input size",
            value=[f"{one.in_features} inputs, {one.format}" for one in weights],
            remedy="stack those that agree",
        )
    zero_points = [one.zero_point for one in weights if one.zero_point is not None]
    return PackedWeight(
        codes=torch.cat([one.codes for one in weights]),
        scale=torch.cat([one.scale for one in weights]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        format=weights[0].format,
        in_features=weights[0].in_features,
    )


def split(weight: PackedWeight, sizes: Sequence[int]) -> list[PackedWeight]:
    """The inverse of ``concatenate``: copies, so that no part keeps the whole alive."""
    zero_points = [None] * len(sizes) if weight.zero_point is None else weight.zero_point.split(list(sizes))
    parts = zip(weight.codes.split(list(sizes)), weight.scale.split(list(sizes)), zero_points, strict=True)
    return [
        PackedWeight(
            codes.clone(), scale.clone(), None if zero is None else zero.clone(), weight.format, weight.in_features
        )
        for codes, scale, zero in parts
    ]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [O, I] in [-8, 7] or [0, 15] to uint8 [O, ceil(I / 2)], even columns in the low halves."""
    halves = codes.view(torch.uint8) & 0xF
    if halves.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1))
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, num_columns: int, *, signed: bool) -> torch.Tensor:
    """The inverse of ``pack_nibbles``: int8 [O, num_columns] if ``signed``, else uint8."""
    halves = torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1)[:, :num_columns]
    # Flipping the sign bit and subtracting it extends the sign of a two's complement half.
    return ((halves ^ 8).view(torch.int8) - 8) if signed else halves.contiguous()
