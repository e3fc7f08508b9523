"""Learned smoothing: modality-aware (arXiv 2603.04800, equations 12 to 14), or one factor for all tokens.

One factor per channel and modality, started at sqrt(max|x_m| / max|w|) and trained so that the decoder block, quantized
with a separate weight Q(W s_m) per modality, reproduces the float block: loss = sum_m lambda_m MAE_m. The parameters
are log s in float32 (the reference trains s itself in bfloat16, where steps vanish above 16).
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from masq.calibration.replay import advance
from masq.errors import NumericalError
from masq.models.base import GROUPS, Modality, Role
from masq.numerics.affine import fake_quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from masq.calibration.replay import BlockData, ReplayBatch
    from masq.models.base import BlockAdapter
    from masq.numerics.scheme import Scheme, TensorFormat
    from masq.transforms.config import LearnedSmoothing

Factors = dict[str, dict[Modality, torch.Tensor]]

# A loss that ends a little above its start is noise (the start is kept); this many times above is divergence.
_DIVERGED = 10.0


@dataclass(frozen=True)
class LearnedFactors:
    """Outcome of learning on one block.

    Attributes:
        log_factors: log s_m, float32 [d_in] by group and modality. The logarithm is what is learned and kept: a chain
            run again from it is bit-identical, which it would not be from s.
        initial_loss: loss of the calibration set at the starting factors.
        final_loss: loss at the factors that were kept.
        reverted: learning ended above the initial loss, so the starting factors were kept.
        outputs: outputs [B, T, d] of the fake-quantized block at the kept factors, by batch: the next block's inputs.
    """

    log_factors: Factors
    initial_loss: float
    final_loss: float
    reverted: bool
    outputs: list[torch.Tensor]


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


class _Rows:
    """Rows of the current batch by the modality whose factor they take, shared by the linears of a block.

    Args:
        known: modalities with a factor of their own; rows of others take that of text.
    """

    def __init__(self, known: Collection[Modality]) -> None:
        self.known = torch.tensor(sorted(known), dtype=torch.int8)
        self.sizes: dict[Modality, int] = {}
        self.num_calls = 0
        self.order = self.restore = torch.empty(0, dtype=torch.long)

    def set(self, modality: torch.Tensor) -> None:
        """Index int8 [B, T]; padding rows ride with a modality that is there, and never reach the loss."""
        self.num_calls += 1
        flat = modality.reshape(-1)
        flat = torch.where(flat < 0, flat[flat >= 0].min(), flat)
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

    def __init__(self, log_factors: Mapping[Modality, torch.Tensor], rows: _Rows, fmt: TensorFormat | None) -> None:
        self.log_factors, self.rows, self.format = log_factors, rows, fmt
        self._source: tuple[torch.Tensor | None, int] = (None, 0)
        self._parts: dict[Modality, torch.Tensor] = {}

    def parts(self, x: torch.Tensor) -> dict[Modality, torch.Tensor]:
        """Rows ``fq(x / s_m)`` [n, d_in] by modality of ``x`` [B, T, d_in]."""
        if x is not self._source[0] or self.rows.num_calls != self._source[1]:
            flat = x.reshape(-1, x.shape[-1]).float()
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
        weight: TensorFormat | None,
        activation: TensorFormat | None,
    ) -> None:
        super().__init__()
        self.weight = linear.weight.detach().float()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.source = source
        self.weight_format = weight
        self.activation = activation
        # Without smoothing the rounded weight never changes.
        self.static = _fake(self.weight, weight) if source is None else None
        self._rounded: dict[Modality, tuple[int, torch.Tensor]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d_in] -> [B, T, d_out] in the dtype of ``x``."""
        if self.source is None:
            assert self.static is not None
            flat = x.reshape(-1, x.shape[-1]).float()
            y = functional.linear(_fake(flat, self.activation), self.static)
        else:
            parts = self.source.parts(x)
            y = self.source.rows.join([functional.linear(rows, self._smoothed(m)) for m, rows in parts.items()])
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _smoothed(self, modality: Modality) -> torch.Tensor:
        """fq(W s_m); without gradients it is kept until log s_m changes."""
        assert self.source is not None
        log_factor = self.source.log_factors[modality]
        version, kept = self._rounded.get(modality, (-1, self.weight))
        if version == log_factor._version and not torch.is_grad_enabled():
            return kept
        rounded = _fake(self.weight * torch.exp(log_factor), self.weight_format)
        if not torch.is_grad_enabled():
            self._rounded[modality] = (log_factor._version, rounded)
        return rounded


def _fake(x: torch.Tensor, fmt: TensorFormat | None) -> torch.Tensor:
    return x if fmt is None else fake_quantize(x, fmt)


@contextmanager
def fake_quantized(
    block: BlockAdapter, log_factors: Mapping[str, Mapping[Modality, torch.Tensor]], scheme: Scheme
) -> Iterator[_Rows]:
    """Replace the linears of a block by differentiable fake-quantized ones while the context lasts.

    Args:
        block: a block with float linears.
        log_factors: log s_m [d_in] by group and modality; a group without an entry is quantized without smoothing.
        scheme: formats and quantized roles.

    Yields:
        The row index to set before each call of the block.
    """
    rows = _Rows({m for by in log_factors.values() for m in by} or {Modality.TEXT})
    originals = {Role(role): block.linear(Role(role)) for role in scheme.roles}
    group_of = {Role(role): group for group, roles in GROUPS.items() for role in roles}
    sources = {group: _SharedInput(logs, rows, scheme.activation) for group, logs in log_factors.items()}
    try:
        for role, linear in originals.items():
            assert isinstance(linear, nn.Linear)
            source = sources.get(group_of[role])
            block.set_linear(role, _FakeQuantLinear(linear, source, scheme.weight, scheme.activation))
        yield rows
    finally:
        for role, linear in originals.items():
            block.set_linear(role, linear)


def learn_factors(
    block: BlockAdapter,
    name: str,
    initial: Factors,
    data: BlockData,
    scheme: Scheme,
    config: LearnedSmoothing,
    *,
    seed: int,
) -> LearnedFactors:
    """Train log s of one block by Adam on minibatches.

    Args:
        block: the float block.
        name: the block's name, for errors and for the key of its random stream.
        initial: starting factors by group and modality.
        data: inputs of the quantized chain and outputs of the float chain.
        scheme: formats.
        config: epochs, learning rate, loss weights.
        seed: seed of the run; the order of batches depends on (seed, name, epoch) alone.

    Raises:
        NumericalError: the loss is NaN or infinite; the message names the block.
    """
    weights = {Modality[key.upper()]: value for key, value in config.loss_weights.items()}
    logs = {g: {m: f.float().log().requires_grad_() for m, f in by.items()} for g, by in initial.items()}
    parameters = [log for by in logs.values() for log in by.values()]
    with fake_quantized(block, logs, scheme) as rows:

        def output_of(index: int) -> torch.Tensor:
            rows.set(data.batches[index].modality)
            return block.forward(data.hidden[index], data.batches[index].kwargs)

        def loss_of(output: torch.Tensor, index: int) -> torch.Tensor:
            return block_loss(output, data.targets[index], data.batches[index].modality, weights)

        initial_loss, initial_outputs = _measure(output_of, loss_of, len(data.batches), name)
        _train(lambda index: loss_of(output_of(index), index), parameters, len(data.batches), name, config, seed)
        final_loss, final_outputs = _measure(output_of, loss_of, len(data.batches), name)
    if final_loss > _DIVERGED * initial_loss:
        raise NumericalError(
            f"learning the smoothing of {name} must not diverge",
            value=f"loss {initial_loss:.4g} -> {final_loss:.4g}",
            remedy="lower method.smoothing.learning_rate; finished blocks are kept",
        )
    reverted = final_loss > initial_loss
    starting = {g: {m: f.float().log() for m, f in by.items()} for g, by in initial.items()}
    learned = {g: {m: log.detach() for m, log in by.items()} for g, by in logs.items()}
    return LearnedFactors(
        log_factors=starting if reverted else learned,
        initial_loss=initial_loss,
        final_loss=initial_loss if reverted else final_loss,
        reverted=reverted,
        outputs=initial_outputs if reverted else final_outputs,
    )


def block_loss(
    output: torch.Tensor, target: torch.Tensor, modality: torch.Tensor, weights: Mapping[Modality, float]
) -> torch.Tensor:
    """Sum over modalities of lambda_m times the mean absolute error of the rows of m (equation 14's per-modality mean).

    Args:
        output: [B, T, d].
        target: [B, T, d].
        modality: int8 [B, T]; padding and modalities without a weight do not count.
        weights: lambda_m.
    """
    error = (output.float() - target.float()).abs().mean(-1)
    terms = [weight * error[modality == m].mean() for m, weight in weights.items() if bool((modality == m).any())]
    return torch.stack(terms).sum()


def _train(
    loss_of: Callable[[int], torch.Tensor],
    parameters: list[torch.Tensor],
    num_batches: int,
    name: str,
    config: LearnedSmoothing,
    seed: int,
) -> None:
    """Adam with a cosine decay to zero over all steps."""
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    total = config.epochs * num_batches
    if total == 0:
        return
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    for epoch in range(config.epochs):
        for index in _order(num_batches, seed, name, epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(index)
            _require_finite(float(loss.detach()), name)
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _measure(
    output_of: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor, int], torch.Tensor],
    num_batches: int,
    name: str,
) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over the batches, and the outputs behind it."""
    outputs = [output_of(index) for index in range(num_batches)]
    total = sum(float(loss_of(output, index)) for index, output in enumerate(outputs))
    _require_finite(total, name)
    return total / max(num_batches, 1), outputs


def _require_finite(loss: float, name: str) -> None:
    if not loss < float("inf"):
        raise NumericalError(
            f"the smoothing loss of {name} must be finite",
            value=loss,
            remedy="lower method.smoothing.learning_rate; finished blocks are kept",
        )


def _order(num_batches: int, seed: int, name: str, epoch: int) -> list[int]:
    """Permutation of the batches keyed by (seed, block, epoch), so that a resumed run repeats it."""
    digest = hashlib.sha256(f"smoothing|{seed}|{name}|{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_batches, generator=generator).tolist()


def run_fake_quantized(
    block: BlockAdapter,
    name: str,
    log_factors: Factors,
    hidden: Sequence[torch.Tensor],
    batches: Sequence[ReplayBatch],
    scheme: Scheme,
) -> list[torch.Tensor]:
    """Outputs [B, T, d] of the block with a separate weight Q(W s_m) per modality: the chain that learning follows."""
    outputs = []
    with torch.no_grad(), fake_quantized(block, log_factors, scheme) as rows:
        for hidden_btd, batch in zip(hidden, batches, strict=True):
            rows.set(batch.modality)
            outputs.append(advance(block, hidden_btd, batch, name))
    return outputs
