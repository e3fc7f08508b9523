"""What is left to rounding where corrections follow: the goal and the second moment of a weight for all modalities.

One stored weight W_hat serves text, which reads ``W S_t``, and every other modality m, which reads ``W S_m`` and whose
tokens get a correction of rank R afterwards. To first order that removes what W_hat does in the R directions that are
strongest in their second moment ``C_m``; W_hat answers for the rest, ``tail_R(C_m)``:

    sum_m lambda_m |W S_m - W_hat|^2 in the norm of tail_R(C_m)  =  |B - W_hat|^2 in that of H,  up to a constant,
    H = sum_m lambda_m tail_R(C_m),  B = W S_t + sum_m lambda_m W (S_m - S_t) tail_R(C_m) H^-1.

Text has no correction: its tail is all of C_t. Where inputs are rounded to ``G_m x + n`` (``masq.rounding.inputs``),
W_hat acts on that while corrections act on x: with ``T_m = tail_R(C_m)`` and the noise's variances ``D_m``,

    sum_m lambda_m (|W S_m - W_hat G_m|^2 in the norm of T_m + |W_hat|^2 in that of D_m):
    H = sum_m lambda_m (G_m T_m G_m + D_m),  B = sum_m lambda_m W S_m T_m G_m H^-1.

Shapes: I input channels, O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from masq.models.base import Modality
from masq.numerics.linalg import damped_cholesky

if TYPE_CHECKING:
    from collections.abc import Mapping

    from masq.numerics.linalg import Spectrum
    from masq.rounding.inputs import InputRounding

# Of the mean of H's diagonal, added to it where it is inverted: directions that no token uses keep the weight of text.
_DAMPING = 1e-3


@dataclass(frozen=True, eq=False)
class Remainder:
    """What a weight is rounded towards.

    Attributes:
        weight: B, float64 [O, I].
        moment: H, float64 [I, I].
    """

    weight: torch.Tensor
    moment: torch.Tensor


def remainder(
    smoothed: Mapping[Modality, torch.Tensor],
    covariances: Mapping[Modality, Spectrum],
    ranks: Mapping[Modality, int],
    tokens: Mapping[Modality, int],
    share: Literal["signal", "tokens"],
    inputs: Mapping[Modality, InputRounding] | None = None,
) -> Remainder | None:
    """Goal and second moment of one linear.

    Args:
        smoothed: W S_m, float64 [O, I] by modality, text among them.
        covariances: C_m, [I, I], of the modalities that occurred; linears that read the same input share them.
        ranks: of corrections; a modality without one has none.
        tokens: how many occurred, by modality.
        share: lambda_m: ``signal`` takes the inverse energy of the modality's outputs, so that relative errors count
            alike; ``tokens`` their number, so that every token's error does.
        inputs: what rounding does to the inputs, by modality; left out, they are taken as they are.

    Returns:
        None if no token occurred. With equal factors and without corrections B is W S_t and H the plain sum.
    """
    text = smoothed[Modality.TEXT]
    if not covariances:
        return None
    moment, shift = torch.zeros_like(next(iter(covariances.values())).matrix), torch.zeros_like(text)
    for modality, covariance in covariances.items():
        own = smoothed.get(modality, text)
        energy = float(((own @ covariance.matrix) * own).sum())
        weight = (1 / energy if energy > 0 else 0.0) if share == "signal" else float(tokens[modality])
        left = covariance.tail(ranks.get(modality, 0))
        rounded = inputs.get(modality) if inputs else None
        if rounded is not None:
            seen = rounded.seen(left)
            shift += (own @ left * rounded.gain - text @ seen) * weight
            moment += seen * weight
            continue
        left = left * weight
        moment += left
        if modality is not Modality.TEXT:
            shift += (own - text) @ left
    mean = float(moment.diagonal().mean())
    if mean <= 0:
        return None
    goal = text + torch.cholesky_solve(shift.t(), damped_cholesky(moment, _DAMPING)).t()
    return Remainder(goal, moment / mean)
