"""What rounding does to the inputs of a linear, channel by channel: a gain and noise.

A row ``x`` is multiplied as ``q(x)``. Channel by channel, ``q = g x + n`` with ``g = E[x q] / E[x^2]`` leaves noise n
that is uncorrelated with x; its variance is ``E[q^2] - g^2 E[x^2]`` (Bussgang's decomposition). Noise of different
channels is taken as uncorrelated. Channels that are small beside the largest of their row are rounded to zero more
often than not: their gain is below one, and a weight that knows this relies on the others instead.

Rows are weighed by 1 / max|x|^2, as for centres: the few tokens with massive activations, alike in every sample, would
otherwise make the noise of all others.

Shapes: n rows, I input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.numerics.affine import fake_quantize

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat


@dataclass(frozen=True, eq=False)
class InputRounding:
    """Of the rows of one modality.

    Attributes:
        gain: g, float64 [I].
        variance: of the noise, float64 [I], not negative.
    """

    gain: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, fmt: TensorFormat | None) -> InputRounding:
        """Measured on smoothed rows [n, I] in a format; gain 1 and no noise where nothing is rounded or seen."""
        exact = rows.double()
        rounded = exact if fmt is None or not len(rows) else fake_quantize(rows.float(), fmt).double()
        weight = exact.abs().amax(1).square().reciprocal().nan_to_num(posinf=0.0)
        energy, shared = weight @ exact.square(), weight @ (exact * rounded)
        gain = torch.where(energy > 0, shared / energy, 1.0)
        variance = (weight @ rounded.square() - gain * shared).clamp(min=0)
        return cls(gain, variance / weight.sum().clamp(min=1e-300))

    def seen(self, moment: torch.Tensor) -> torch.Tensor:
        """Second moment of rounded rows, of which those before rounding have ``moment`` [I, I]."""
        return self.gain.unsqueeze(1) * moment * self.gain + torch.diag(self.variance)
