"""Learned smoothing: modality-aware (arXiv 2603.04800, equations 12 to 14), or one factor for all tokens.

One factor per channel and modality, started at sqrt(max|x_m| / max|w|) and trained so that the decoder block, quantized
with a separate weight Q(W s_m) per modality, reproduces the float block: loss = sum_m lambda_m MAE_m. The parameters
are log s in float32 (the reference trains s itself in bfloat16, where steps vanish above 16).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from masq import parallel
from masq.errors import NumericalError
from masq.models.base import Modality
from masq.transforms.fake_quantized import Factors, fake_quantized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from masq.calibration.replay import BlockData
    from masq.models.base import BlockAdapter
    from masq.models.tensor_files import Collected
    from masq.numerics.scheme import Scheme
    from masq.transforms.config import LearnedSmoothing

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
    outputs: Collected


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
        scheme: formats, of this block.
        config: epochs, learning rate, loss weights.
        seed: seed of the run; the order of batches depends on (seed, name, epoch) alone.

    Raises:
        NumericalError: the loss is NaN or infinite; the message names the block.
    """
    weights = {Modality[key.upper()]: value for key, value in config.loss_weights.items()}
    logs = {g: {m: f.float().log().requires_grad_() for m, f in by.items()} for g, by in initial.items()}
    parameters = [log for by in logs.values() for log in by.values()]
    by_linear = config.objective == "linear"
    with fake_quantized(block, logs, scheme, alone=by_linear) as rows:

        def output_of(index: int) -> torch.Tensor:
            rows.set(data.batches[index].modality)
            return block.forward(data.hidden[index], data.batches[index].kwargs)

        def loss_of(output: torch.Tensor, index: int) -> torch.Tensor:
            target = data.targets[index].float()
            errors = rows.errors if by_linear else [(output.float() - target).abs().mean(-1)]
            modality = data.batches[index].modality
            return torch.stack([weighted_error(e, modality, weights, config.mean) for e in errors]).sum()

        initial_loss, initial_outputs = _measure(output_of, loss_of, len(data.batches), name, data.collect())
        _train(lambda index: loss_of(output_of(index), index), parameters, len(data.batches), name, config, seed)
        final_loss, final_outputs = _measure(output_of, loss_of, len(data.batches), name, data.collect())
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


def weighted_error(
    error: torch.Tensor, modality: torch.Tensor, weights: Mapping[Modality, float], mean: str = "modality"
) -> torch.Tensor:
    """Sum over modalities of lambda_m times the mean error of the rows of m (arXiv 2603.04800, equation 14).

    Args:
        error: mean |error| of each token, [B, T].
        modality: int8 [B, T]; padding and modalities without a weight do not count.
        weights: lambda_m.
        mean: ``modality`` divides by the tokens of m, ``token`` by all that are not padding (the released code), so
            that a modality counts by its share of the tokens.

    Returns:
        The part of this process where there are several: tokens are counted in all of them.
    """
    rows = {m: modality == m for m in weights}
    counts = parallel.summed(torch.stack([*(one.sum() for one in rows.values()), (modality >= 0).sum()])).tolist()
    terms = [
        weights[m] * error[one].sum() / (count if mean == "modality" else counts[-1])
        for (m, one), count in zip(rows.items(), counts, strict=False)
        if count
    ]
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
        for index in order_of(num_batches, seed, name, epoch):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(index)
            _require_finite(_everywhere(float(loss.detach())), name)
            loss.backward()
            _join_gradients(parameters)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _measure(
    output_of: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor, int], torch.Tensor],
    num_batches: int,
    name: str,
    outputs: Collected,
) -> tuple[float, Collected]:
    """Mean loss over the batches, and the outputs behind it."""
    total = 0.0
    for index in range(num_batches):
        output = output_of(index)
        outputs.append(output)
        total += float(loss_of(output, index))
    total = _everywhere(total)
    _require_finite(total, name)
    return total / max(num_batches, 1), outputs


def _everywhere(loss: float) -> float:
    """The sum of a loss over processes."""
    return loss if parallel.size() == 1 else float(parallel.summed(torch.tensor(loss, dtype=torch.float64)))


def _join_gradients(parameters: list[torch.Tensor]) -> None:
    """Sum gradients over processes; one that no process has stays away."""
    if parallel.size() == 1:
        return
    for one in parameters:
        present = parallel.summed(torch.tensor(float(one.grad is not None), device=one.device))
        if present:
            one.grad = parallel.summed(torch.zeros_like(one) if one.grad is None else one.grad)


def _require_finite(loss: float, name: str) -> None:
    if not loss < float("inf"):
        raise NumericalError(
            f"the smoothing loss of {name} must be finite",
            value=loss,
            remedy="lower method.smoothing.learning_rate; finished blocks are kept",
        )


def order_of(num_batches: int, seed: int, name: str, epoch: int) -> list[int]:
    """Permutation of the batches keyed by (seed, block, epoch), so that a resumed run repeats it."""
    digest = hashlib.sha256(f"smoothing|{seed}|{name}|{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(num_batches, generator=generator).tolist()
