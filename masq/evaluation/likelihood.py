"""Teacher-forced log-probabilities at the positions that predict answer tokens, and nowhere else.

Shapes: B batch, T tokens, R rows (answer tokens of the batch, row by row), d hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from masq.errors import NumericalError
from masq.numerics.finite import is_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from masq.models.base import EncodedBatch, ModelAdapter

# Rows whose logits exist at one time: 64 rows of float64 over 150,000 words are 77 MB.
ROWS_PER_CHUNK = 64


def predicting_rows(batch: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sample each answer token belongs to, and which token it is.

    Args:
        batch: encoded with answers.

    Returns:
        Index of the sample, int64 [R], and token id, int64 [R], in reading order.
    """
    # The first position has no predecessor that could predict it, so it is never an answer token.
    scored = batch.answer_mask[:, 1:]
    return scored.nonzero()[:, 0], batch.inputs["input_ids"][:, 1:][scored]


@torch.no_grad()
def head_inputs(adapter: ModelAdapter, batch: EncodedBatch) -> torch.Tensor:
    """Run the model and return what its head reads at the positions that predict answer tokens.

    The head itself is not run: logits of every token over a large vocabulary would dominate time and memory.

    Args:
        adapter: the model; hooks that observe its blocks stay active.
        batch: encoded with answers.

    Returns:
        Hidden states [R, d] in the model's dtype.
    """
    kept: list[torch.Tensor] = []

    def keep(_head: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        hidden_btd = args[0]
        kept.append(hidden_btd[:, :-1][batch.answer_mask[:, 1:]])
        return (hidden_btd[:, :0],)

    handle = adapter.head().register_forward_pre_hook(keep)
    try:
        adapter.model(**batch.inputs, use_cache=False)
    finally:
        handle.remove()
    return kept[0]


@torch.no_grad()
def log_probabilities(adapter: ModelAdapter, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-softmax of the head's output, in chunks of rows.

    Logits are computed in the model's dtype and are exact in float32; the softmax runs in float64.

    Args:
        adapter: the model whose head is applied.
        rows: what the head reads, [R, d].

    Yields:
        float64 [<= ROWS_PER_CHUNK, V].

    Raises:
        NumericalError: a logit is NaN or infinite.
    """
    head = adapter.head()
    for chunk in rows.split(ROWS_PER_CHUNK):
        logits = head(chunk).float()
        if not is_finite(logits):
            raise NumericalError(
                "logits must be finite",
                value="NaN or infinity",
                remedy="raise model.dtype to float32 or use a wider scheme; finished batches are kept",
            )
        yield torch.log_softmax(logits.double(), dim=-1)


def picked(log_probability: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Entries [R] of ``log_probability`` [R, V] at ``ids`` [R]."""
    return log_probability.gather(1, ids.unsqueeze(1)).squeeze(1)


def sum_by_owner(chunks: list[torch.Tensor], owners: torch.Tensor, size: int) -> tuple[list[float], list[int]]:
    """Sum row values by what they belong to (a sample, a choice).

    Args:
        chunks: float64 values of consecutive rows, R in total.
        owners: number of the owner of each row, int64 [R].
        size: how many owners there are.

    Returns:
        Sums and numbers of rows, each of length ``size``.
    """
    # On the CPU, where the order of additions, and so the last bit, is fixed.
    owners = owners.cpu()
    values = torch.cat(chunks).cpu() if chunks else torch.zeros(0, dtype=torch.float64)
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, owners, values)
    return sums.tolist(), torch.bincount(owners, minlength=size).tolist()
