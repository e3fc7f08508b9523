"""Signal-to-quantization-noise ratio of token vectors."""

from __future__ import annotations

import torch

CAP_DB = 200.0
"""Reported for identical vectors, whose ratio is infinite."""


def token_sqnr(reference: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """SQNR by token, ``10 log10(|y|^2 / |y - y_q|^2)`` in dB.

    Args:
        reference: y [..., d].
        output: y_q [..., d].

    Returns:
        float64 [...], within +-``CAP_DB``.
    """
    signal = reference.double().square().sum(-1)
    noise = (reference.double() - output.double()).square().sum(-1)
    ratio = torch.log10(signal / noise).mul(10.0).clamp(-CAP_DB, CAP_DB)
    return torch.where(noise == 0, torch.full_like(ratio, CAP_DB), ratio)
