"""The scale and the strength of a modality's smoothing, chosen by the error that is left after its correction.

A factor ``S_m`` of modality m is one of a family between text's and its own, ``S_t^(1-g) (c S_m)^g``. Activations with
a scale per token do not see c; a correction of one shared weight does, for it has to make up ``W S - W_hat``.
``g = 0`` is QERA (arXiv 2410.06040) on text's factor, ``g = 1, c = 1`` is MASQuant (arXiv 2603.04800) as written.
Shapes: n tokens, I input channels, O output channels, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from masq.numerics.affine import fake_quantize
from masq.numerics.linalg import damped_cholesky

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from masq.numerics.scheme import TensorFormat

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of g that are tried."""
# Steps of log c, each taken from the best so far.
_STEPS = (-0.4, 0.4, -0.2, 0.2, -0.1, 0.1, -0.05, 0.05)


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

    @cached_property
    def products(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """W^T W, W_hat^T W and W_hat^T W_hat, float64 [I, I]: the same for every modality and factor."""
        return self.weight.t() @ self.weight, self.stored.t() @ self.weight, self.stored.t() @ self.stored


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

    For rows X and a factor S, with ``A = X / S`` and T a square root of A's damped second moment, it is

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
            # float32 is enough once the difference is formed: what matters is a share of the largest eigenvalues.
            scale = max(float(gram.diagonal().max()), 1e-300)
            values = torch.linalg.eigvalsh((gram / scale).float())
            left = scale * float(values[: len(values) - one.rank].double().clamp(min=0).sum())
            total += (left + shrink**2 * noise) / signal if signal > 0 else 0.0
        return total

    def _of(self, strength: float) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        """By linear, for c = 1: P P^T, P Q^T + Q P^T, Q Q^T of P = T (W S)^T and Q = T W_hat^T; noise."""
        if strength not in self._parts:
            self._parts[strength] = self._measure(self.factor(strength, 0.0).double())
        return self._parts[strength]

    def _measure(self, factor: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        inverse = factor.reciprocal()
        covariance = self._both_sides(self._moment * torch.outer(inverse, inverse))
        root = damped_cholesky(covariance, self._damping)
        smoothed = self._turn(self._rows * inverse.float())
        noises: dict[TensorFormat, torch.Tensor] = {}
        found = []
        for one in self._linears:
            noise = 0.0
            if one.activation is not None and len(smoothed):
                if one.activation not in noises:
                    error = smoothed - fake_quantize(smoothed, one.activation)
                    noises[one.activation] = (error.t() @ error).double() / len(smoothed)
                noise = float((noises[one.activation] * one.products[2]).sum())
            found.append((*self._grams(one, factor, root), noise))
        return found

    def _grams(
        self, one: GaugedLinear, factor: torch.Tensor, root: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the smaller side of the weight."""
        outputs, inputs = one.weight.shape
        if outputs < inputs:
            p, q = self._turn(one.weight * factor) @ root, one.stored @ root
            cross = p @ q.t()
            return p @ p.t(), cross + cross.t(), q @ q.t()
        weight, mixed, stored = one.products
        both = root.t() @ self._both_sides(weight * torch.outer(factor, factor)) @ root
        cross = root.t() @ self._turn(mixed * factor) @ root
        return both, cross + cross.t(), root.t() @ stored @ root

    def _both_sides(self, matrix: torch.Tensor) -> torch.Tensor:
        """R^T M R of a symmetric M, exactly symmetric."""
        turned = self._turn(self._turn(matrix).t())
        return (turned + turned.t()) / 2


def search_gauge(error: PostCorrectionError) -> tuple[torch.Tensor, Gauge]:
    """The factor of the family with the least error: first g, at the geometric mean of text's factor, then c.

    (1, 1) and g = 0 are always among what is compared.

    Returns:
        The factor, float32 [I], and what was chosen.
    """
    matching = error.matching_scale()
    points = [(1.0, 0.0), (0.0, 0.0), *((strength, matching) for strength in STRENGTHS[1:])]
    found = {point: error(*point) for point in points}
    for step in _STEPS:
        strength, scale = min(found, key=lambda key: found[key])
        if strength > 0:
            found[strength, scale + step] = error(strength, scale + step)
    strength, scale = min(found, key=lambda key: found[key])
    return error.factor(strength, scale), Gauge(
        strength=strength,
        scale=float(torch.tensor(scale, dtype=torch.float64).exp()),
        error=found[strength, scale],
        given_error=found[1.0, 0.0],
        text_error=found[0.0, 0.0],
    )
