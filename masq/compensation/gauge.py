"""The scale and the strength of a modality's smoothing, chosen by the error that is left after its correction.

A factor ``S_m`` of modality m is one of a family between text's and its own, ``S_t^(1-g) (c S_m)^g``. Activations with
a scale per token do not see c; a correction of one shared weight does, for it has to make up ``W S - W_hat``.
``g = 0`` is QERA (arXiv 2410.06040) on text's factor, ``g = 1, c = 1`` is MASQuant (arXiv 2603.04800) as written.
Shapes: n tokens, I input channels, O output channels, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq.numerics.affine import fake_quantize
from masq.numerics.linalg import whitener

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from masq.numerics.scheme import TensorFormat

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of g that are tried."""
_COARSE = (-0.4, 0.0, 0.4)
_FINE = (-0.2, 0.2, -0.1, 0.1, -0.05, 0.05)


@dataclass(frozen=True, eq=False)
class GaugedLinear:
    """A linear of the group.

    Attributes:
        weight: W, float64 [O, I].
        stored: W_hat on text's factor, float64 [O, I].
        rank: of its correction.
        activation: format of its input, None for float.
    """

    weight: torch.Tensor
    stored: torch.Tensor
    rank: int
    activation: TensorFormat | None


@dataclass(frozen=True)
class Gauge:
    """A choice.

    Attributes:
        strength: g.
        scale: c, relative to the modality's own factor.
        error: relative error of the outputs after the correction, summed over the linears.
        given_error: the same at g = 1, c = 1.
        text_error: the same at g = 0, where c does not matter.
    """

    strength: float
    scale: float
    error: float
    given_error: float
    text_error: float


class PostCorrectionError:
    """Relative output error of the tokens of one modality once every linear of the group is corrected.

    For rows X and a factor S, with ``A = X / S`` and T the square root of A's damped second moment, it is

        sum_l (tail_R |T (W S - W_hat)^T|^2 + mean_t |(a_t - Q(a_t)) W_hat^T|^2) / tr(W H W^T),

    tail_R being the squared singular values beyond the first R. The noise of activations is taken as uncorrelated with
    what the correction leaves.

    Args:
        rows: X, float32 [n, I]: a sample of the tokens.
        moment: H, [I, I]: of all tokens.
        text: text's factor, [I].
        own: the modality's factor, [I].
        linears: those that read X.
        damping: of T, relative.
        turn: an orthogonal map of the last dimension that rows and smoothed weights go through before rounding;
            ``stored`` is behind it already. None for none.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        moment: torch.Tensor,
        text: torch.Tensor,
        own: torch.Tensor,
        linears: Sequence[GaugedLinear],
        damping: float,
        turn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._rows, self._moment, self._damping = rows, moment.double(), damping
        self._log_text, self._log_own = text.double().log(), own.double().log()
        self._linears, self._turn = linears, turn or (lambda x: x)
        self._signal = [float(((one.weight @ self._moment) * one.weight).sum()) for one in linears]
        self._parts: dict[float, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]] = {}

    def factor(self, strength: float, log_scale: float) -> torch.Tensor:
        """``S_t^(1-g) (c S_m)^g``, float32 [I]."""
        return ((1 - strength) * self._log_text + strength * (self._log_own + log_scale)).exp().float()

    def matching_scale(self) -> float:
        """Log c that gives the modality's factor the geometric mean of text's."""
        return float(self._log_text.mean() - self._log_own.mean())

    def __call__(self, strength: float, log_scale: float) -> float:
        """The error at (g, c).

        With A and T of c = 1, those of c are A / c^g and T / c^g; three Gram matrices of g serve every c.
        """
        shrink = float(torch.tensor(-strength * log_scale, dtype=torch.float64).exp())
        total = 0.0
        for (both, cross, stored, noise), one, signal in zip(
            self._of(strength), self._linears, self._signal, strict=True
        ):
            gram = both - shrink * cross + shrink**2 * stored
            values = torch.linalg.eigvalsh(gram)
            left = float(values[: len(values) - one.rank].clamp(min=0).sum())
            total += (left + shrink**2 * noise) / signal if signal > 0 else 0.0
        return total

    def _of(self, strength: float) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        """By linear, for c = 1: P P^T, P Q^T + Q P^T, Q Q^T of P = T (W S)^T and Q = T W_hat^T; noise."""
        if strength not in self._parts:
            self._parts[strength] = self._measure(self.factor(strength, 0.0).double())
        return self._parts[strength]

    def _measure(self, factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        inverse = factor.reciprocal()
        turned = self._turn(self._turn(self._moment * torch.outer(inverse, inverse)).t())
        root = whitener((turned + turned.t()) / 2, self._damping).sqrt
        smoothed = self._turn(self._rows * inverse.float())
        found = []
        for one in self._linears:
            p, q = root @ self._turn(one.weight * factor).t(), root @ one.stored.t()
            if p.shape[0] > p.shape[1]:
                p, q = p.t(), q.t()
            noise = 0.0
            if one.activation is not None and len(smoothed):
                error = smoothed - fake_quantize(smoothed, one.activation)
                noise = float((error @ one.stored.float().t()).square().sum()) / len(smoothed)
            cross = p @ q.t()
            found.append((p @ p.t(), cross + cross.t(), q @ q.t(), noise))
        return found


def search_gauge(error: PostCorrectionError) -> tuple[torch.Tensor, Gauge]:
    """The factor of the family with the least error, on a grid of g and a line search in c.

    c starts at 1 and at the geometric mean of text's factor; (1, 1) and g = 0 are always among what is compared.

    Returns:
        The factor, float32 [I], and what was chosen.
    """
    matching = error.matching_scale()
    found = {(1.0, 0.0): error(1.0, 0.0), (0.0, 0.0): error(0.0, 0.0)}
    for strength in STRENGTHS[1:]:
        for offset in _COARSE:
            found[strength, matching + offset] = error(strength, matching + offset)
    strength, scale = min(found, key=lambda key: found[key])
    if strength > 0:
        for offset in _FINE:
            _, best = min(found, key=lambda key: found[key])
            found[strength, best + offset] = error(strength, best + offset)
        strength, scale = min(found, key=lambda key: found[key])
    return error.factor(strength, scale), Gauge(
        strength=strength,
        scale=float(torch.tensor(scale, dtype=torch.float64).exp()),
        error=found[strength, scale],
        given_error=found[1.0, 0.0],
        text_error=found[0.0, 0.0],
    )
