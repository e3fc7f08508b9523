"""A linear whose input is rotated first, at run time."""

from __future__ import annotations

import torch
from torch import nn

from masq.numerics.hadamard import rotate


class RotatedInput(nn.Module):
    """``y = linear(x R)`` with the orthogonal R of ``masq.numerics.hadamard.rotate`` (QuaRot, arXiv 2404.00456).

    A block adapter looks through it: the linear inside is what statistics see and what quantization replaces.

    Args:
        linear: the linear whose weight was multiplied by R, [O, I].
        signs: diagonal of R's sign flips, +-1, [I].
    """

    signs: torch.Tensor

    def __init__(self, linear: nn.Module, signs: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O], the rotation in float32."""
        return self.linear(rotate(x.float(), self.signs).to(x.dtype))
