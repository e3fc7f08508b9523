"""Perplexity per token of one long text in windows of fixed length, as papers on quantization print it.

Shapes: L length of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ConfigError, DataError
from masq.evaluation.batch_store import BatchStore, Progress, ProgressLog, run_batches
from masq.evaluation.likelihood import (
    ROWS_PER_CHUNK,
    head_inputs,
    log_probabilities,
    picked,
    predicting_rows,
    sum_by_owner,
)
from masq.evaluation.outcomes import Outcomes, hash_samples
from masq.models.base import EncodedBatch

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.base import ModelAdapter

LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive tokens of the text.

    Attributes:
        id: its place and a hash of its tokens.
        ids: token ids, as many as all other windows have.
    """

    id: str
    ids: tuple[int, ...]


def token_perplexity(
    adapter: ModelAdapter,
    texts: Sequence[str],
    length: int = LENGTH,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Outcomes:
    """Perplexity per token of ``texts`` as GPTQ's evaluation has it (arXiv 2210.17323, section 4), and papers since.

    All texts, joined by empty lines, are tokenized at once; the tokens are cut into consecutive windows, of which a
    last incomplete one is dropped. Every window is read on its own: its first token is not predicted, the others see
    the window from its beginning. The value, exp(sum of NLL / predicted tokens), is ``statistics.value`` of what is
    returned. It is not comparable with perplexities per word.

    Args:
        adapter: the model; with quantized linears, the modality hook is already installed.
        texts: for WikiText-2 the rows of the raw test split, empty ones included.
        length: tokens of a window.
        folder: finished windows are kept there and reused; of this model alone. None keeps nothing.
        progress: told after every window; logs a line by default.

    Returns:
        NLL in nats and number of predicted tokens (``length`` - 1) of every window.

    Raises:
        ConfigError: windows of fewer than two tokens.
        DataError: a text shorter than one window.
        NumericalError: a logit is NaN or infinite.
    """
    cut = windows(adapter.tokenizer("\n\n".join(texts))["input_ids"], length)
    if folder is None:
        found = [one for window in cut for one in _compute(adapter, [window])]
    else:
        store, named = BatchStore(folder, {"length": length}), [(f"window-{n:04d}", [one]) for n, one in enumerate(cut)]
        found = run_batches("windows", named, lambda batch: _compute(adapter, batch), store, progress or ProgressLog())
    return Outcomes(
        metric=f"token_perplexity_{length}",
        higher_is_better=False,
        samples=hash_samples(window.id for window in cut),
        numerators=tuple(one["nll"] for one in found),
        denominators=(length - 1.0,) * len(cut),
        transform="exp",
    )


def windows(ids: Sequence[int], length: int) -> list[Window]:
    """Consecutive windows of ``length`` tokens; what is left over at the end is dropped.

    Raises:
        ConfigError: windows of fewer than two tokens, in which nothing is predicted.
        DataError: fewer tokens than one window has.
    """
    if length < 2:
        raise ConfigError("a window needs at least two tokens", value=length)
    parts = [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    if not parts:
        raise DataError(
            "the text must fill at least one window",
            value=f"{len(ids)} tokens, windows of {length}",
            remedy="take more text or shorter windows",
        )
    return [Window(f"{index}/{_digest(part)}", part) for index, part in enumerate(parts)]


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def _compute(adapter: ModelAdapter, batch: Sequence[Window]) -> list[dict[str, Any]]:
    """NLL in nats of each window, summed in float64."""
    ids = torch.tensor([window.ids for window in batch])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    encoded = EncodedBatch(inputs, adapter.modality_of(inputs), scored).to(adapter.device)
    owners, targets = predicting_rows(encoded)
    rows = head_inputs(adapter, encoded)
    chunks = zip(log_probabilities(adapter, rows), targets.split(ROWS_PER_CHUNK), strict=True)
    sums, _ = sum_by_owner([-picked(log_p, wanted) for log_p, wanted in chunks], owners, len(batch))
    return [{"id": window.id, "nll": nll} for window, nll in zip(batch, sums, strict=True)]
