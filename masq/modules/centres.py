"""Centres of modalities beside the weights: what is taken from every row, and the bias that gives it back.

Shapes: N rows, I input channels, O output channels, K modalities that have a centre, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.models.base import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping

STORED = torch.bfloat16
"""Dtype of stored centres. Their biases are made from what is stored, so that nothing is lost by rounding them."""


@dataclass(frozen=True, eq=False)
class Centres:
    """Centres of one linear, in the place of its bias.

    Attributes:
        centre: c_m one below the other, [K, I], text's first.
        rows: which of them a modality takes, int64 [M]; one that calibration never saw takes text's.
        bias: of the linear with what the float weight makes of each centre, [K, O].
    """

    centre: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, centres: Mapping[Modality, torch.Tensor], biases: Mapping[Modality, torch.Tensor]) -> Centres:
        """From [I] and [O] by modality, text among them."""
        order = sorted(centres)
        which = [m if m in centres else Modality.TEXT for m in Modality if m is not Modality.PADDING]
        centre = torch.stack([centres[modality] for modality in order])
        rows = torch.tensor([order.index(modality) for modality in which], device=centre.device)
        return cls(centre, rows, torch.stack([biases[modality] for modality in order]))
