"""A learned affine transform of what linears read, of the kind of FlatQuant (arXiv 2410.09426): the shared rival.

Every group of linears gets an invertible ``P = P1 (x) P2`` and a diagonal s, the same for all modalities, and learned
shares of the ranges are kept: ``y = fq((x / s) P) fq(P^-1 (s W^T))``. All are trained through rounding so that the
quantized block gives what the float block gives. At run time P is two small products per input. The Kronecker factors
are learned as they are (FlatQuant learns their singular value decomposition), their inverses taken at every step.
Shapes: I input channels = D1 * D2, O output channels, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from masq.models.base import GROUPS, BlockAdapter, Role
from masq.numerics.affine import fake_quantize
from masq.numerics.scheme import LinearFormat, Scheme, TensorFormat
from masq.pipeline.fitting import Chain

EPOCHS, LEARNING_RATE, CLIP_START = 15, 5e-3, 4.0


def factor_sides(size: int) -> tuple[int, int]:
    """The divisors of a size that are nearest to each other, the smaller first."""
    smaller = next(side for side in range(math.isqrt(size), 0, -1) if size % side == 0)
    return smaller, size // smaller


class AffineInput(nn.Module):
    """P and s of one group: ``forward`` maps rows [N, I], ``weight`` the weights that read them.

    Args:
        size: I.
        generator: of the orthogonal matrices to start from.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        sides = factor_sides(size)
        starts = [torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for side in sides]
        self.first, self.second = (nn.Parameter(start) for start in starts)
        self.log_scale = nn.Parameter(torch.zeros(size))
        self.clip = nn.Parameter(torch.tensor(CLIP_START))

    def _through(self, rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        cube = rows.reshape(-1, len(first), len(second))
        return (first.t() @ cube @ second).reshape(rows.shape)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``(x / s) P``."""
        return self._through(rows * (-self.log_scale).exp(), self.first, self.second)

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``(W s) P^-T`` of a weight [O, I]."""
        inverses = (torch.linalg.inv(one).t() for one in (self.first, self.second))
        return self._through(weight * self.log_scale.exp(), *inverses)


class AffineLinear(nn.Module):
    """A linear behind the transform of its group, fake-quantized.

    Args:
        linear: the float linear.
        source: of its group.
        fmt: of weight and input.
    """

    def __init__(self, linear: nn.Linear, source: AffineInput, fmt: LinearFormat) -> None:
        super().__init__()
        self.float_weight, self.bias = linear.weight.detach(), linear.bias
        self.source, self.format = source, fmt
        self.clip = nn.Parameter(torch.full((linear.out_features, 1), CLIP_START))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, I] -> [B, T, O]."""
        rows = clipped(self.source(x.flatten(0, -2)), self.source.clip, self.format.activation)
        weight = clipped(self.source.weight(self.float_weight), self.clip, self.format.weight)
        return functional.linear(rows, weight, self.bias).view(*x.shape[:-1], -1)


def clipped(values: torch.Tensor, clip: torch.Tensor, fmt: TensorFormat | None) -> torch.Tensor:
    """Quantize rows [.., I] on the share sigmoid(clip) of each one's range."""
    if fmt is None:
        return values
    edge = values.detach().abs().amax(-1, keepdim=True) * torch.sigmoid(clip)
    return fake_quantize(torch.maximum(torch.minimum(values, edge), -edge), fmt)


def attach(block: BlockAdapter, scheme: Scheme, seed: int) -> list[nn.Parameter]:
    """Replace the quantized linears of a block, in place.

    Returns:
        What is learned.
    """
    generator, parameters = torch.Generator().manual_seed(seed), []
    for group, roles in GROUPS.items():
        inside = {Role(role): scheme.formats[role] for role in roles if role in scheme.formats}
        linears = {role: block.linear(role) for role in inside}
        sizes = {linear.in_features for linear in linears.values() if isinstance(linear, nn.Linear)}
        for size in sizes:
            source = AffineInput(size, generator)
            parameters += list(source.parameters())
            for role, linear in linears.items():
                assert isinstance(linear, nn.Linear), group
                layer = AffineLinear(linear, source, inside[role])
                parameters.append(layer.clip)
                block.set_linear(role, layer)
    return parameters


def learn(
    block: BlockAdapter, parameters: Sequence[nn.Parameter], chain: Chain, targets: Sequence[torch.Tensor], epochs: int
) -> tuple[float, float]:
    """Train by Adam with a cosine decay on the mean squared error of tokens that are not padding.

    Returns:
        Mean loss of the first epoch and of the last.
    """
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    count = len(chain.hidden)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * count)
    generator, means = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(count, generator=generator).tolist():
            batch = chain.replay[index]
            rows = batch.modality >= 0
            output = block.forward(chain.hidden[index], batch.kwargs)
            loss = (output - targets[index])[rows].square().mean() / targets[index][rows].square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        means.append(total / count)
    return means[0], means[-1]


def stored_bits(parameters: Sequence[nn.Parameter], size: Mapping[str, float]) -> dict[str, Any]:
    """Bits per weight of rounding to nearest with 16 bits for every number of P and s; clips are in the scales."""
    numbers = sum(one.numel() for one in parameters if one.shape[-1:] != (1,) and one.dim())
    extra = 16 * numbers / size["num_weights"]
    return {**size, "total": size["total"] + extra, "transforms": extra}
