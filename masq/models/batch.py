"""Samples as a model takes them.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class EncodedBatch:
    """Samples as a model takes them, left-padded.

    Attributes:
        inputs: keyword arguments of the model's forward pass.
        modality: int8 [B, T], -1 where padded.
        answer_mask: bool [B, T], the tokens whose likelihood is scored.
    """

    inputs: dict[str, torch.Tensor]
    modality: torch.Tensor
    answer_mask: torch.Tensor

    def to(self, device: torch.device | str) -> EncodedBatch:
        """The same batch on ``device``."""
        return EncodedBatch(
            {name: value.to(device) for name, value in self.inputs.items()},
            self.modality.to(device),
            self.answer_mask.to(device),
        )
