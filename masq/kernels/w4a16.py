"""4-bit weights with float inputs in our own kernels: what ``masq.kernels.cpu`` hands over here.

Codes are multiplied exactly and summed in float32, and a group's sum is scaled once: an output is within
``(I + 4) 2^-24 sum_k |x_k| (|code_k| + zero) scale`` of the float64 product with the dequantized weight. One exception:
with instructions for bfloat16, of such an input with more rows than half the inputs of a group, and several groups,
dequantized weights are rounded to bfloat16, which adds up to ``2^-8 sum_k |x_k w_k|``.

Shapes: N rows, I input channels, O output channels, G groups of input channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from masq.kernels.base import LinearSpec, PreparedWeight, QuantizedActivation
from masq.kernels.build import BuildError
from masq.numerics.packing import NIBBLE_BITS, PackedWeight, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    from collections.abc import Callable

STRIP, SLICE, WORD = 16, 32, 8
VNNI = 2
"""Number of the instruction set from which on these kernels run."""


def not_supported_reasons(spec: LinearSpec, isa: Callable[[], int]) -> list[str]:
    """Why a linear with float inputs cannot run here; ``isa`` tells the instruction set, or raises ``BuildError``."""
    weight = spec.format.weight
    reasons = []
    if weight.bits > NIBBLE_BITS:
        reasons.append(f"float inputs with weights of {weight.bits} bits: only up to {NIBBLE_BITS}")
    if weight.group_size is not None and weight.group_size % SLICE:
        reasons.append(f"groups of {weight.group_size} inputs: not a multiple of {SLICE}")
    try:
        if not reasons and isa() < VNNI:
            reasons.append("float inputs need AVX512")
    except BuildError as error:
        reasons.append(str(error))
    return reasons


def prepare(weight: PackedWeight) -> PreparedWeight:
    """Words of eight codes, strips of 16 outputs; see ``csrc/w4a16.cpp``. 4 bits a code, sizes rounded up to 32."""
    codes = unpack_nibbles(weight.codes, weight.in_features, signed=False)
    padded = functional.pad(codes, (0, -codes.shape[1] % SLICE, 0, -codes.shape[0] % (2 * STRIP)))
    strips = padded.view(padded.shape[0] // STRIP, STRIP, -1, WORD).permute(0, 2, 1, 3)
    # Little-endian: the first code of a word is its lowest half-byte.
    tensors = {
        "words": (strips[..., 0::2] | (strips[..., 1::2] << 4)).contiguous(),
        "scale": _strips(weight.scale),
    }
    if weight.zero_point is not None:
        tensors["zero"] = _strips(weight.zero_point)
    return PreparedWeight(tensors, weight.format, weight.in_features, weight.out_features)


def restore(prepared: PreparedWeight) -> PackedWeight:
    """The inverse of ``prepare``."""
    words = prepared.tensors["words"]
    strips = torch.stack((words & 0xF, words >> 4), dim=-1).flatten(-2)
    codes = strips.permute(0, 2, 1, 3).reshape(words.shape[0] * STRIP, -1)
    codes = codes[: prepared.out_features, : prepared.in_features]
    zero = prepared.tensors.get("zero")
    return PackedWeight(
        pack_nibbles(codes),
        _channels(prepared.tensors["scale"], prepared.out_features),
        None if zero is None else _channels(zero, prepared.out_features),
        prepared.format,
        prepared.in_features,
    )


def arguments(activation: QuantizedActivation, prepared: PreparedWeight, dtypes: dict[torch.dtype, int]) -> list[Any]:
    """What ``masq_gemm_w4a16`` takes of input and weight."""
    tensors = prepared.tensors
    size = prepared.format.group_size or -(-prepared.in_features // SLICE) * SLICE
    zero = tensors.get("zero")
    return [
        *(activation.data.data_ptr(), dtypes[activation.data.dtype], tensors["words"].data_ptr()),
        *(tensors["scale"].data_ptr(), None if zero is None else zero.data_ptr(), size, tensors["scale"].shape[1]),
    ]


def _strips(values: torch.Tensor) -> torch.Tensor:
    """[O, G] to [strips, G, 16]."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % (2 * STRIP)))
    return padded.view(-1, STRIP, values.shape[1]).permute(0, 2, 1).contiguous()


def _channels(strips: torch.Tensor, out_features: int) -> torch.Tensor:
    """The inverse of ``_strips``."""
    return strips.permute(0, 2, 1).reshape(-1, strips.shape[1])[:out_features].contiguous()
