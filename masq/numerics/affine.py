"""Affine integer quantization of tensors: codes, scales, and a differentiable version for learning.

Shapes: ``...`` any leading dimensions (rows), D input channels, G groups per row (1 unless per_group), E = D / G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ConfigError

if TYPE_CHECKING:
    from masq.numerics.scheme import TensorFormat

# Below this a float32 scale loses precision (subnormal) and the largest code could leave [-qmax, qmax]; such a row,
# the all-zero row included, holds nothing a 16-bit float would keep either, and is stored as zeros with scale 1.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes with their scales: ``x ~ (codes - zero_point) * scale`` within each group.

    Attributes:
        codes: [..., D], int8 if the format is symmetric, uint8 otherwise.
        scale: float32 [..., G].
        zero_point: float32 [..., G] holding integers, None if the format is symmetric.
        format: what the codes mean.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    format: TensorFormat

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The represented values, [..., D] in ``dtype``.

        The product is computed in float64 if that is ``dtype``, else in float32 and then rounded once to ``dtype``.
        """
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        codes = self.codes.to(compute).unflatten(-1, (self.scale.shape[-1], -1))
        zero_point = None if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return _dequantize(codes, self.scale.unsqueeze(-1), zero_point).to(dtype)


def quantize(x: torch.Tensor, fmt: TensorFormat) -> QuantizedTensor:
    """Round to the nearest integer code, half to even.

    Symmetric, restricted range: ``scale = max|x| / qmax``, ``codes = round(x / scale)`` in [-qmax, qmax].
    Asymmetric: ``scale = (max(x, 0) - min(x, 0)) / qmax``, ``zero_point = round(-min(x, 0) / scale)``,
    ``codes = clamp(round(x / scale) + zero_point, 0, qmax)``, so that zero is always represented exactly.
    Maxima run over a row (per_channel of a weight [out, in], per_token of an activation) or over a group of it.
    With ``clip`` below 1 the scale is so much smaller, and codes are clamped.
    Codes follow from the float32 scale that is stored, not from a more precise one.

    Args:
        x: floating point [..., D]; computed in float64 if it is float64, else in float32.
        fmt: bits, symmetry, granularity.

    Returns:
        Codes and scales. An all-zero row has scale 1, codes 0 and zero point 0. A row holding NaN or infinity has
        a scale that is not finite, so its dequantized values are not finite either.

    Raises:
        ConfigError: ``group_size`` does not divide D; the message lists sizes that do.
    """
    groups = _grouped(x, fmt)
    scale, zero_point = _scale_and_zero_point(groups, fmt)
    codes = _codes(groups, scale, zero_point, fmt).flatten(-2)
    return QuantizedTensor(
        codes=codes.to(torch.int8 if fmt.symmetric else torch.uint8),
        scale=scale.squeeze(-1),
        zero_point=None if zero_point is None else zero_point.squeeze(-1),
        format=fmt,
    )


def fit_scale(x: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scales and zero points with which ``quantize`` rounds ``x`` [..., D]: float32 [..., G] both.

    Raises:
        ConfigError: as ``quantize``.
    """
    scale, zero_point = _scale_and_zero_point(_grouped(x, fmt), fmt)
    return scale.squeeze(-1), None if zero_point is None else zero_point.squeeze(-1)


def encode(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: TensorFormat) -> torch.Tensor:
    """Nearest codes of ``x`` on a given grid, values beyond its ends clamped to them.

    Args:
        x: floating point, any shape that ``scale`` broadcasts to.
        scale: positive.
        zero_point: integers, None if the format is symmetric.
        fmt: bits and symmetry.

    Returns:
        Integers in the dtype of ``x``.
    """
    return _codes(x, scale, zero_point, fmt).clamp_(fmt.qmin, fmt.qmax)


def nearest(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: TensorFormat) -> torch.Tensor:
    """``fake_quantize(x, fmt)`` where its grid is known.

    Args:
        x: floating point [..., D].
        scale: float32 [..., G], of ``fit_scale(x, fmt)``.
        zero_point: likewise.
        fmt: bits, symmetry, granularity.

    Returns:
        [..., D] in the dtype of ``x``, without a gradient.
    """
    grid = scale.unsqueeze(-1), None if zero_point is None else zero_point.unsqueeze(-1)
    return _dequantize(_codes(_grouped(x, fmt), *grid, fmt), *grid).to(x.dtype)


def nearest_backward(
    x: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: TensorFormat
) -> torch.Tensor:
    """What ``fake_quantize`` makes of a gradient; arguments are those of ``nearest``, and the gradient [..., D]."""
    groups = _grouped(x, fmt)
    grad = grad.to(groups.dtype).unflatten(-1, groups.shape[-2:])
    if zero_point is None:
        found = _symmetric_backward(groups, grad, scale.unsqueeze(-1), fmt)
    else:
        found = _asymmetric_backward(groups, grad, scale.unsqueeze(-1), zero_point.unsqueeze(-1), fmt)
    return found.flatten(-2).to(x.dtype)


def fake_quantize(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """``quantize(x, fmt).dequantize(x.dtype)`` with a gradient.

    Rounding passes gradients straight through, and the scale is differentiated: with z = x / scale, q = round(z),
    ``dy = dx + (q - z) dscale`` and ``dscale = sign(x_k) dx_k / qmax`` at the element k of largest magnitude
    (LSQ, arXiv 1902.08153, section 2.1, with the scale tied to max|x|). Asymmetric: the zero point is a constant,
    clamped elements pass ``(code - zero_point) dscale`` alone, and ``dscale = (dx_max - dx_min) / qmax``.

    Args:
        x: floating point [..., D].
        fmt: bits, symmetry, granularity.

    Returns:
        [..., D] in the dtype of ``x``.

    Raises:
        ConfigError: as ``quantize``.
    """
    return _FakeQuantize.apply(x, fmt)  # type: ignore[no-any-return]


class _FakeQuantize(torch.autograd.Function):
    """One node of the graph that keeps ``x`` and the scales only: learning is bound by memory traffic."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        grid = fit_scale(x, fmt)
        ctx.save_for_backward(x, *grid)
        ctx.format = fmt
        return nearest(x, *grid, fmt)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, scale, zero_point = ctx.saved_tensors
        return nearest_backward(x, grad_outputs[0], scale, zero_point, ctx.format), None


def _symmetric_backward(
    groups: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, fmt: TensorFormat
) -> torch.Tensor:  # [..., G, E]
    grad_scale, passed = _symmetric_parts(groups / scale, grad, fmt)
    largest = groups.abs().argmax(-1, keepdim=True)
    return _add_at_extreme(passed, groups, largest, grad_scale / fmt.divisor, signed=True)


def _symmetric_parts(
    z: torch.Tensor, grad: torch.Tensor, fmt: TensorFormat
) -> tuple[torch.Tensor, torch.Tensor]:  # [..., G, 1] and [..., G, E]
    """Gradient of the scale, and what passes straight through; its large temporaries end with it."""
    codes = torch.round(z)
    if fmt.clip == 1:
        return codes.sub_(z).mul_(grad).sum(-1, keepdim=True), grad
    inside = codes.abs() <= fmt.qmax
    grad_scale = ((codes.clamp_(fmt.qmin, fmt.qmax) - z * inside) * grad).sum(-1, keepdim=True)
    return grad_scale, grad * inside


def _asymmetric_backward(
    groups: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, fmt: TensorFormat
) -> torch.Tensor:  # [..., G, E]
    z = groups / scale
    unclamped = torch.round(z) + zero_point
    codes = unclamped.clamp(fmt.qmin, fmt.qmax)
    inside = codes == unclamped
    grad_scale = ((codes - zero_point - z * inside) * grad).sum(-1, keepdim=True) / fmt.qmax
    highest, lowest = groups.argmax(-1, keepdim=True), groups.argmin(-1, keepdim=True)
    # An extreme on the wrong side of zero does not set the range, which always includes zero.
    sets_top = groups.gather(-1, highest) > 0
    sets_bottom = groups.gather(-1, lowest) < 0
    out = _add_at_extreme(grad * inside, groups, highest, grad_scale * sets_top, signed=False)
    return _add_at_extreme(out, groups, lowest, -grad_scale * sets_bottom, signed=False)


def _add_at_extreme(
    grad: torch.Tensor, groups: torch.Tensor, index: torch.Tensor, value: torch.Tensor, *, signed: bool
) -> torch.Tensor:
    """``grad`` plus ``value`` (times the sign of the element, if ``signed``) at ``index`` of the last dimension."""
    if signed:
        value = value * groups.gather(-1, index).sign()
    return grad.scatter_add(-1, index, value)


def _grouped(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """View [..., D] as [..., G, E] in the dtype of the computation."""
    num_channels = x.shape[-1]
    size = fmt.group_size if fmt.granularity == "per_group" and fmt.group_size else num_channels
    if size == 0 or num_channels % size:
        divisors = [d for d in range(8, num_channels + 1) if num_channels % d == 0]
        raise ConfigError(
            f"group_size must divide the {num_channels} input channels",
            value=size,
            remedy=f"use one of {', '.join(map(str, divisors)) or num_channels}",
        )
    compute = x if x.dtype == torch.float64 else x.float()
    return compute.unflatten(-1, (num_channels // size, size))


def _scale_and_zero_point(
    groups: torch.Tensor, fmt: TensorFormat
) -> tuple[torch.Tensor, torch.Tensor | None]:  # float32 [..., G, 1] both
    # Two plain reductions are several times faster on CPU than aminmax or a maximum norm, and need no copy.
    highest, lowest = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    span = torch.maximum(highest, -lowest) if fmt.symmetric else highest.clamp(min=0) - lowest.clamp(max=0)
    # By a tensor where the span is: dividing by a number, CUDA multiplies by its rounded reciprocal.
    scale = (span / torch.full((), fmt.divisor, dtype=span.dtype, device=span.device)).float()
    # The comparison is false for NaN, which therefore survives.
    scale = torch.where(scale < _SMALLEST_SCALE, torch.ones_like(scale), scale)
    if fmt.symmetric:
        return scale, None
    return scale, torch.round(-lowest.clamp(max=0) / scale).float()


def _codes(
    groups: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, fmt: TensorFormat
) -> torch.Tensor:
    """Integers [..., G, E] in the dtype of ``groups``."""
    codes = (groups / scale).round_()
    if zero_point is None:
        # Unclipped |x| / scale <= qmax (1 + 2^-22), which rounds to qmax: no clamp is needed.
        return codes if fmt.clip == 1 else codes.clamp_(fmt.qmin, fmt.qmax)
    return codes.add_(zero_point).clamp_(fmt.qmin, fmt.qmax)


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    """(codes - zero_point) * scale, [..., G, E] -> [..., D]. ``codes`` is a temporary and is overwritten."""
    if zero_point is not None:
        codes = codes.sub_(zero_point)
    return codes.mul_(scale).flatten(-2)
