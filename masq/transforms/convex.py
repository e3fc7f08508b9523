"""Smoothing factors as the optimum of a convex error model: a geometric program instead of training through rounding.

With v = log s^2, round-off of activations (a step per token) and of weights (a step per output channel, or per group of
input channels) taken as uniform noise, the squared error of the outputs of one modality's tokens is

    E(v) = mean_t max_i(x_ti^2 e^-v_i) sum_i e^v_i |w_i|^2 / 12 q_a^2 + sum_jg max_i(e^v_i w_ij^2) e_g(v) / 12 q_w^2,

where e_g is the sum of E[x_i^2] e^-v_i over the channels of group g, and q the largest code. Every factor is a sum or a
maximum of exponentials of linear functions, so products and sums of them are log-convex: log E has no local optimum but
its global one. Maxima are taken as norms of order p, which are above them by at most n^(1/p) and smooth.
Shapes: n tokens, I input channels, O output channels, G groups of E channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.errors import NumericalError
from masq.transforms.smoothing import MAX_FACTOR, MIN_FACTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.transforms.search import SearchedLinear

# Channels with a smaller share of the largest energy than this are as good as absent: their factor stays 1.
_ABSENT = 1e-12


@dataclass(frozen=True, eq=False)
class _Product:
    """``const * mean_t |x_t e^(-v/2)|_p^2 * <e^v, energy>`` by part, or its mirror image with -v.

    Attributes:
        powers: (|x| / its largest)^p, float64 [n, E].
        largest: squares of the largest of each row, [n], with every constant factor.
        energy: [E].
        channels: where these channels lie.
        sign: -1 where the maxima are those of activations, +1 of weights.
    """

    powers: torch.Tensor
    largest: torch.Tensor
    energy: torch.Tensor
    channels: slice
    sign: int

    def __call__(self, v: torch.Tensor, power: int) -> torch.Tensor:
        part = v[self.channels]
        # A common shift of v leaves the product as it is, and keeps the exponentials in range.
        part = part - part.mean().detach()
        maxima = (self.powers @ (self.sign * part * (power / 2)).exp()).pow(2 / power)
        return (self.largest @ maxima) * (self.energy @ (-self.sign * part).exp())


class ErrorModel:
    """E(v) of one group of linears on the tokens of one modality.

    Args:
        rows: inputs float32 [n, I] of these tokens.
        linears: the quantized linears that read them.
        power: p, even.
    """

    def __init__(self, rows: torch.Tensor, linears: Sequence[SearchedLinear], power: int) -> None:
        self.power = power
        x = rows.double()
        energy_x = x.square().mean(0)
        self._terms: list[_Product] = []
        for one in linears:
            weight = one.weight.double()
            if one.activation_format is not None:
                step = _noise(one.activation_format.bits) / len(x)
                self._terms.append(_product(x, weight.square().sum(0), slice(None), -1, power, step))
            size = one.weight_format.group_size or weight.shape[1]
            for start in range(0, weight.shape[1], size):
                part = slice(start, start + size)
                step = _noise(one.weight_format.bits)
                self._terms.append(_product(weight[:, part], energy_x[part], part, 1, power, step))

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        """E, a float64 scalar, for v = log s^2, float64 [I]."""
        return torch.stack([term(v, self.power) for term in self._terms]).sum()


def convex_factor(rows: torch.Tensor, linears: Sequence[SearchedLinear], power: int, steps: int) -> torch.Tensor:
    """The factor s that minimises the error model of these tokens, its geometric mean 1.

    Args:
        rows: inputs float32 [n, I] of the tokens of one modality.
        linears: the quantized linears that read them.
        power: order of the norms that stand for maxima, even.
        steps: iterations of L-BFGS at most.

    Returns:
        float32 [I] within [1e-5, 1e5], computed in float64. A channel without activations or weights has factor 1.

    Raises:
        NumericalError: rows or weights are not finite.
    """
    weights = torch.cat([one.weight for one in linears]).double()
    _require_finite(rows, weights)
    energy_x, energy_w = rows.double().square().mean(0), weights.square().mean(0)
    active = (energy_x > _ABSENT * energy_x.max()) & (energy_w > _ABSENT * energy_w.max())
    if not bool(active.any()):
        return torch.ones_like(energy_x).float()
    model = ErrorModel(rows, linears, power)
    # The optimum of the model if all maxima were root mean squares: a start near to it.
    start = torch.where(active, (energy_x / energy_w.where(active, energy_w.new_ones(()))).log() / 2, 0.0)
    start = torch.where(active, start - start[active].mean(), 0.0)
    v = _minimize(model, start, active, steps)
    v = torch.where(active, v - v[active].mean(), 0.0)
    return (v / 2).exp().clamp(MIN_FACTOR, MAX_FACTOR).float()


@torch.enable_grad()
def _minimize(model: ErrorModel, start: torch.Tensor, active: torch.Tensor, steps: int) -> torch.Tensor:
    v = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v], max_iter=steps, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6, tolerance_change=1e-7
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(v).log()
        (gradient,) = torch.autograd.grad(loss, v)
        v.grad = torch.where(active, gradient, 0.0)
        return loss

    optimizer.step(closure)
    return v.detach()


def _product(
    values: torch.Tensor, energy: torch.Tensor, channels: slice, sign: int, power: int, constant: float
) -> _Product:
    largest = values.abs().amax(1)
    scaled = values.abs() / largest.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
    return _Product(scaled.pow(power), largest.square() * constant, energy, channels, sign)


def _noise(bits: int) -> float:
    """Variance of round-off relative to the square of the largest value: 1 / (12 q^2)."""
    return 1 / (12 * (2 ** (bits - 1) - 1) ** 2)


def _require_finite(rows: torch.Tensor, weights: torch.Tensor) -> None:
    if not bool(torch.isfinite(rows).all() and torch.isfinite(weights).all()):
        raise NumericalError(
            "activations and weights must be finite to smooth them",
            value="NaN or infinity",
            remedy="check the checkpoint and the calibration samples",
        )
