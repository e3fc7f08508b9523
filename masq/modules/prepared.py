"""What linears that run as one hold while a kernel has their weights.

Shapes: I input channels, O output channels of a member, R its rank, W how many columns of U a kernel takes for it.
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
        left: L1 of all members side by side, [I, sum of R], by modality; where a kernel multiplies L2, each followed by
            as many columns of zeros as it asks for.
        right: L2 of each member, None where it has none, by modality; or all of them in the layout of the kernel.
        scale: of the components of all members, float32, one for each column of ``left``, by modality; none where
            factors are as they are.
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

    def plain_left(self, modality: Modality) -> tuple[torch.Tensor, torch.Tensor | None]:
        """L1 of all members side by side and the scales of its columns, as they are stored."""
        held, left, scale = self.right[modality], self.left[modality], self.scale.get(modality)
        if not isinstance(held, PreparedFactors):
            return left, scale
        return held.narrowed(left), None if scale is None else held.narrowed(scale)

    def fuse(self, sizes: Sequence[int], activation: TensorFormat | None, fused: bool) -> None:
        """Hand L2 over to the kernel, as far as it multiplies it itself, or take it back."""
        for modality, held in self.right.items():
            if fused and not isinstance(held, PreparedFactors):
                made = self.kernel.prepare_factors(held, sizes, activation)
                if made is not None:
                    self._set(modality, made, made.widened(self.left[modality]), self.scale.get(modality))
            elif not fused and isinstance(held, PreparedFactors):
                self._set(modality, self.kernel.restore_factors(held), *self.plain_left(modality))

    def _set(
        self,
        modality: Modality,
        right: list[torch.Tensor | None] | PreparedFactors,
        left: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> None:
        self.right[modality], self.left[modality] = right, left
        if scale is not None:
            self.scale[modality] = right.widened(scale) if isinstance(right, PreparedFactors) else scale
