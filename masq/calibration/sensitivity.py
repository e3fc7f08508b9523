"""How sensitive the loss is to the outputs of each decoder block, by modality: the weights of MBQ (arXiv 2412.19509).

To first order an error dY of a block's output changes the loss by at most ``sum |dL/dY| |dY|``; the mean |dL/dY| over
the tokens of a modality says how much an error on its rows counts. One batch at a time is run forward through the
blocks, keeping their inputs, and then back, each block being computed again for its own gradient: memory holds the
hidden states of one batch and the graph of one block, and parameters have no gradients.
Shapes: B batch, T tokens, R tokens that predict an answer token, L blocks, M modalities.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from masq.calibration.replay import advance, capture
from masq.errors import NumericalError
from masq.models.base import Modality

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from masq.models.base import EncodedBatch, ModelAdapter

# Rows whose logits exist at one time.
_ROWS_PER_CHUNK = 64
_MODALITIES = tuple(modality for modality in Modality if modality is not Modality.PADDING)


def gradient_sums(adapter: ModelAdapter, batch: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes of the gradient at the output of every block, summed over the tokens of a batch.

    The loss of a sample is the mean negative log-likelihood of its answer tokens, so that a sample's gradient does not
    depend on what else is in the batch.

    Args:
        adapter: the float model.
        batch: encoded with answers.

    Returns:
        Sums over tokens of mean |dL/dY| over channels, float64 [L, M], and numbers of tokens, int64 [M], text first.

    Raises:
        NumericalError: an output or a gradient is NaN or infinite.
    """
    hidden, replay = capture(adapter, [batch])
    blocks, states = adapter.blocks(), list(hidden)
    for index, block in enumerate(blocks):
        states.append(advance(block, states[-1], replay[0], f"block {index}"))
    rows_by = {which: batch.modality == which for which in _MODALITIES}
    grad = _loss_gradient(adapter, states.pop(), batch)
    # Gradients of a long answer are small; in 16 bits they are carried at a scale where none of them vanishes.
    scale = float(grad.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    grad = (grad / scale).to(hidden[0].dtype)
    sums = torch.zeros(len(blocks), len(_MODALITIES), dtype=torch.float64)
    for index in reversed(range(len(blocks))):
        magnitude = grad.abs().mean(-1, dtype=torch.float32).double()
        sums[index] = torch.stack([magnitude[rows].sum() for rows in rows_by.values()]).cpu() * scale
        state = states.pop()
        if index:
            leaf = state.detach().requires_grad_()
            with torch.enable_grad():
                output = blocks[index].forward(leaf, replay[0].kwargs)
            (grad,) = torch.autograd.grad(output, leaf, grad)
    if not bool(torch.isfinite(sums).all()):
        raise NumericalError(
            "the gradients of the loss at the outputs of blocks must be finite",
            value="NaN or infinity",
            remedy="raise model.dtype to float32, or use method.smoothing=awq, which needs none",
        )
    return sums, torch.tensor([int(rows.sum()) for rows in rows_by.values()])


def _loss_gradient(adapter: ModelAdapter, hidden: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
    """Gradient of the summed loss of the samples at the last block's output [B, T, d]: float32 [B, T, d]."""
    scored = batch.answer_mask[:, 1:]
    targets = batch.inputs["input_ids"][:, 1:][scored]
    owners = scored.nonzero()[:, 0]
    share = 1.0 / scored.sum(1).clamp(min=1).float()[owners]
    parts = []
    for rows, ids, weight in zip(
        *(one.split(_ROWS_PER_CHUNK) for one in (hidden[:, :-1][scored], targets, share)), strict=True
    ):
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            logits = adapter.head()(adapter.final_norm()(leaf)).float()
            loss = (functional.cross_entropy(logits, ids, reduction="none") * weight).sum()
        parts.append(torch.autograd.grad(loss, leaf)[0].float())
    gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    if parts:
        gradient[:, :-1][scored] = torch.cat(parts)
    return gradient


def mean_gradients(sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[dict[Modality, float]]:
    """Mean |dL/dY| over the tokens of each modality that occurred, by block, from the sums of all batches."""
    total = torch.stack([one for one, _ in sums]).sum(0)
    counts = torch.stack([count for _, count in sums]).sum(0)
    present = [(index, which) for index, which in enumerate(_MODALITIES) if counts[index] > 0]
    return [{which: float(row[index] / counts[index]) for index, which in present} for row in total]


def relative_sensitivity(gradients: Sequence[Mapping[Modality, float]], floor: str) -> list[dict[Modality, float]]:
    """Sensitivity of each modality relative to that of text, by block.

    Args:
        gradients: mean magnitudes of the gradient by block and modality, text among them.
        floor: ``median`` lifts a ratio to the median of its modality over the blocks (as MBQ's released code does),
            ``none`` does not.

    Returns:
        By block; text has 1.

    Raises:
        NumericalError: a block's output on text has no gradient.
    """
    if not all(one.get(Modality.TEXT, 0.0) > 0 for one in gradients):
        raise NumericalError(
            "sensitivities are relative to text, whose gradient must not be zero",
            value=f"blocks {[index for index, one in enumerate(gradients) if not one.get(Modality.TEXT, 0.0) > 0]}",
            remedy="calibrate on samples with answers, or use method.smoothing=awq",
        )
    ratios = [{which: value / one[Modality.TEXT] for which, value in one.items()} for one in gradients]
    if floor == "none":
        return ratios
    lowest = {which: statistics.median(one[which] for one in ratios) for which in ratios[0]}
    return [{which: max(value, lowest[which]) for which, value in one.items()} for one in ratios]
