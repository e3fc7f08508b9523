"""What linears that run as one hold while a kernel has their weights.

Shapes: I input channels, O output channels of a member, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from masq.kernels.base import PreparedFactors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from masq.kernels.base import Kernel, PreparedWeight
    from masq.models.base import Modality
    from masq.numerics.scheme import TensorFormat


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything of a stack but what its members keep.

    Attributes:
        kernel: that runs it.
        weight: of all members, one below the other.
        bias: float32 [sum of O], or [K, sum of O] where inputs are centred, or None.
        left: L1 of all members side by side, [I, sum of R], by modality.
        right: L2 of each member, None where it has none, by modality; or all of them in the layout of the kernel.
        scale: of the components of all members, float32 [sum of R], by modality; none where factors are as they are.
    """

    kernel: Kernel
    weight: PreparedWeight
    bias: torch.Tensor | None
    left: dict[Modality, torch.Tensor]
    right: dict[Modality, list[torch.Tensor | None] | PreparedFactors]
    scale: dict[Modality, torch.Tensor]

    def plain_right(self, modality: Modality) -> list[torch.Tensor | None]:
        """L2 of each member as it is stored."""
        held = self.right[modality]
        return self.kernel.restore_factors(held) if isinstance(held, PreparedFactors) else held

    def fuse(self, sizes: Sequence[int], activation: TensorFormat | None, fused: bool) -> None:
        """Hand L2 over to the kernel, as far as it multiplies it itself, or take it back."""
        for modality, held in self.right.items():
            if fused and not isinstance(held, PreparedFactors):
                self.right[modality] = self.kernel.prepare_factors(held, sizes, activation) or held
            elif not fused and isinstance(held, PreparedFactors):
                self.right[modality] = self.kernel.restore_factors(held)
