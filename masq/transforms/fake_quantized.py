"""A decoder block whose linears are quantized in the forward pass and differentiable in their smoothing factors.

Shapes: B batch, T tokens, n rows of one modality, d_in and d_out channels.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from masq.calibration.replay import advance
from masq.models.base import GROUPS, Modality, Role
from masq.numerics.affine import QuantizedTensor, fake_quantize, fit_scale, nearest, nearest_backward, quantize

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from masq.calibration.replay import ReplayBatch
    from masq.models.base import BlockAdapter
    from masq.models.tensor_files import Collected
    from masq.numerics.scheme import LinearFormat, Scheme, TensorFormat

Factors = dict[str, dict[Modality, torch.Tensor]]


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse order, which is a plain gather."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, inverse), None, None


class _SmoothedLinear(torch.autograd.Function):
    """``rows fq(W s)^T``, of which only the grid is kept: rounded again, a weight takes no memory between the passes.

    Autograd would keep W s and fq(W s) of every linear and modality of a block, which is most of the memory that
    learning takes. Values and gradients are those of the composition, bit by bit.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor, fmt: TensorFormat
    ) -> torch.Tensor:
        smoothed = weight * factor
        grid = fit_scale(smoothed, fmt)
        ctx.save_for_backward(rows, weight, factor, *grid)
        ctx.format = fmt
        return functional.linear(rows, nearest(smoothed, *grid, fmt))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        rows, weight, factor, scale, zero_point = ctx.saved_tensors
        grad, smoothed = grad_outputs[0], weight * factor
        grad_rows = grad @ nearest(smoothed, scale, zero_point, ctx.format)
        grad_smoothed = nearest_backward(smoothed, grad.t() @ rows, scale, zero_point, ctx.format)
        return grad_rows, None, grad_smoothed.mul_(weight).sum(0), None


class Rows:
    """Rows of the current batch by the modality whose factor they take, shared by the linears of a block.

    Args:
        known: modalities with a factor of their own; rows of others take that of text.
        alone: whether every linear is looked at alone: it leaves in ``errors`` how far its output [B, T, d_out] is
            from that of the float linear on the same input, as mean |error| [B, T], and no gradient passes on.
    """

    def __init__(self, known: Collection[Modality], *, alone: bool = False) -> None:
        self.alone = alone
        self.errors: list[torch.Tensor] = []
        self.known = torch.tensor(sorted(known), dtype=torch.int8)
        self.sizes: dict[Modality, int] = {}
        self.num_calls = 0
        self.order = self.restore = torch.empty(0, dtype=torch.long)

    def set(self, modality: torch.Tensor) -> None:
        """Index int8 [B, T]; padding rows ride with a modality that is there, and never reach the loss."""
        self.num_calls += 1
        self.errors = []
        flat = modality.reshape(-1)
        counted = flat[flat >= 0]
        flat = torch.where(flat < 0, counted.min() if len(counted) else int(Modality.TEXT), flat)
        flat = torch.where(torch.isin(flat, self.known.to(flat.device)), flat, int(Modality.TEXT))
        numbers, counts = flat.unique(return_counts=True)
        self.sizes = {Modality(m): n for m, n in zip(numbers.tolist(), counts.tolist(), strict=True)}
        self.order = torch.argsort(flat, stable=True)
        self.restore = torch.argsort(self.order)

    def split(self, flat: torch.Tensor) -> dict[Modality, torch.Tensor]:
        """Rows [N, d] by modality."""
        if len(self.sizes) == 1:
            return {next(iter(self.sizes)): flat}
        parts = _Permute.apply(flat, self.order, self.restore).split(list(self.sizes.values()))  # type: ignore[union-attr]
        return dict(zip(self.sizes, parts, strict=True))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo ``split``."""
        if len(parts) == 1:
            return parts[0]
        return _Permute.apply(torch.cat(list(parts)), self.restore, self.order)  # type: ignore[return-value]


class _SharedInput:
    """The smoothed, fake-quantized input of a group, made by its first linear and read by the others."""

    def __init__(self, log_factors: Mapping[Modality, torch.Tensor], rows: Rows, fmt: TensorFormat | None) -> None:
        self.log_factors, self.rows, self.format = log_factors, rows, fmt
        self._source: tuple[torch.Tensor | None, int] = (None, 0)
        self._parts: dict[Modality, torch.Tensor] = {}

    def parts(self, x: torch.Tensor) -> dict[Modality, torch.Tensor]:
        """Rows ``fq(x / s_m)`` [n, d_in] by modality of ``x`` [B, T, d_in]."""
        if x is not self._source[0] or self.rows.num_calls != self._source[1]:
            flat = (x.detach() if self.rows.alone else x).reshape(-1, x.shape[-1]).float()
            smoothed = {m: rows * torch.exp(-self.log_factors[m]) for m, rows in self.rows.split(flat).items()}
            self._source = (x, self.rows.num_calls)
            self._parts = {m: _fake(rows, self.format) for m, rows in smoothed.items()}
        return self._parts


class _FakeQuantLinear(nn.Module):
    """``fq(x / s_m) fq(W s_m)^T + bias`` row by row of the current modality, differentiable in log s."""

    def __init__(
        self,
        linear: nn.Linear,
        source: _SharedInput | None,
        fmt: LinearFormat,
        rows: Rows,
    ) -> None:
        super().__init__()
        # In its own dtype: torch computes its products with float32 factors in float32.
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.source, self.rows = source, rows
        self.weight_format = fmt.weight
        self.activation = fmt.activation
        # Without smoothing the rounded weight never changes.
        self.static = fake_quantize(self.weight.float(), fmt.weight) if source is None else None
        self._rounded: dict[Modality, tuple[int, QuantizedTensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d_in] -> [B, T, d_out] in the dtype of ``x``."""
        if self.source is None:
            assert self.static is not None
            flat = (x.detach() if self.rows.alone else x).reshape(-1, x.shape[-1]).float()
            y = functional.linear(_fake(flat, self.activation), self.static)
        else:
            parts = self.source.parts(x)
            y = self.source.rows.join([self._smoothed(rows, m) for m, rows in parts.items()])
        if self.rows.alone:
            exact = functional.linear(x.detach().reshape(-1, x.shape[-1]).float(), self.weight.float())
            self.rows.errors.append((y - exact).abs().mean(-1).view(x.shape[:-1]))
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _smoothed(self, rows: torch.Tensor, modality: Modality) -> torch.Tensor:
        """Rows times fq(W s_m)^T; without gradients its codes are kept until log s_m changes."""
        assert self.source is not None
        log_factor = self.source.log_factors[modality]
        if torch.is_grad_enabled():
            self._rounded.clear()
            return _SmoothedLinear.apply(rows, self.weight, torch.exp(log_factor), self.weight_format)  # type: ignore[no-any-return]
        version, kept = self._rounded.get(modality, (-1, None))
        if kept is None or version != log_factor._version:
            kept = quantize(self.weight * torch.exp(log_factor), self.weight_format)
            self._rounded[modality] = log_factor._version, kept
        return functional.linear(rows, kept.dequantize())


def _fake(x: torch.Tensor, fmt: TensorFormat | None) -> torch.Tensor:
    return x if fmt is None else fake_quantize(x, fmt)


@contextmanager
def fake_quantized(
    block: BlockAdapter,
    log_factors: Mapping[str, Mapping[Modality, torch.Tensor]],
    scheme: Scheme,
    *,
    alone: bool = False,
) -> Iterator[Rows]:
    """Replace the linears of a block by differentiable fake-quantized ones while the context lasts.

    Args:
        block: a block with float linears.
        log_factors: log s_m [d_in] by group and modality; a group without an entry is quantized without smoothing.
        scheme: formats and quantized roles, of this block.
        alone: see ``Rows``.

    Yields:
        The row index to set before each call of the block.
    """
    rows = Rows({m for by in log_factors.values() for m in by} or {Modality.TEXT}, alone=alone)
    formats = {Role(role): fmt for role, fmt in scheme.formats.items()}
    originals = {role: block.linear(role) for role in formats}
    group_of = {role: group for group, roles in GROUPS.items() for role in roles}
    # Linears of a group read one smoothed input, quantized once for each format.
    sources: dict[tuple[str, TensorFormat | None], _SharedInput] = {}
    try:
        for role, linear in originals.items():
            assert isinstance(linear, nn.Linear)
            key = group_of[role], formats[role].activation
            if key[0] in log_factors and key not in sources:
                sources[key] = _SharedInput(log_factors[key[0]], rows, key[1])
            block.set_linear(role, _FakeQuantLinear(linear, sources.get(key), formats[role], rows))
        yield rows
    finally:
        for role, linear in originals.items():
            block.set_linear(role, linear)


def run_fake_quantized(
    block: BlockAdapter,
    name: str,
    log_factors: Factors,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[ReplayBatch],
    scheme: Scheme,
    outputs: Collected | None = None,
) -> Collected:
    """Outputs [B, T, d] of the block with a separate weight Q(W s_m) per modality: the chain that learning follows.

    They are added to ``outputs``, a new list by default, which is returned.
    """
    outputs = [] if outputs is None else outputs
    with torch.no_grad(), fake_quantized(block, log_factors, scheme) as rows:
        for hidden_btd, batch in zip(hidden, batches, strict=True):
            rows.set(batch.modality)
            outputs.append(advance(block, hidden_btd, batch, name))
    return outputs
