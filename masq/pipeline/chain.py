"""The chain of activations from block to block: outputs, their distance from the float chain, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq import parallel
from masq.calibration.replay import advance
from masq.errors import memory_errors_of
from masq.models.base import Modality
from masq.numerics.sqnr import token_sqnr
from masq.pipeline.fitting import Chain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.calibration.replay import ReplayBatch
    from masq.models.base import BlockAdapter, EncodedBatch
    from masq.models.tensor_files import Collected
    from masq.modules.modality import ModalityContext


@dataclass
class QuantizationReport:
    """What happened, block by block.

    Attributes:
        blocks: per block: index, SQNR of the block output by modality on the calibration tokens of one batch per mix of
            modalities (dB), what ``quantize_block`` notes of corrections and rounding, and, when factors are learned,
            the losses, or, when they are searched, exponents and errors by group.
        warnings: typed fallbacks worth a line under the table.
        seconds: wall time of rotating, of learning and of quantizing (resumed blocks count only their replay).
    """

    blocks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def block_outputs(block: BlockAdapter, name: str, inputs: Chain, context: ModalityContext, into: Collected) -> Chain:
    """The chain behind a block.

    Args:
        block: float or quantized.
        name: for errors.
        inputs: the chain before it.
        context: token modalities of the quantized linears.
        into: an empty list for the outputs.

    Raises:
        NumericalError: an output is NaN or infinite.
        ShortOfMemoryError: it does not fit.
    """
    with memory_errors_of(name):
        for hidden_btd, batch in zip(inputs.hidden, inputs.replay, strict=True):
            context.set(batch.modality)
            into.append(advance(block, hidden_btd, batch, name))
    return Chain(into, inputs.replay)


def one_of_each_mix(replay: Sequence[ReplayBatch]) -> list[int]:
    """Index of the first batch of every set of modalities."""
    first: dict[tuple[bool, ...], int] = {}
    for index, present in enumerate(modalities_present(replay).tolist()):
        first.setdefault(tuple(present), index)
    return sorted(first.values())


def modalities_present(replay: Sequence[ReplayBatch | EncodedBatch]) -> torch.Tensor:
    """Which modalities of tokens are in each batch, in any process: bool [number of batches, M]."""
    tokens = [modality for modality in Modality if modality is not Modality.PADDING]
    own = [[int((batch.modality == modality).any()) for modality in tokens] for batch in replay]
    return parallel.summed(torch.tensor(own, dtype=torch.long).view(len(own), len(tokens))) > 0


def sqnr_text(sqnr: dict[str, float]) -> str:
    """For a progress line."""
    return "SQNR dB " + " ".join(f"{key} {value:.1f}" for key, value in sqnr.items())


def named(sqnr: dict[str, float]) -> dict[str, float]:
    """For whoever listens to the progress."""
    return {f"sqnr_{key}": value for key, value in sqnr.items()}


def mean_sqnr(targets: Chain, outputs: Chain) -> dict[str, float]:
    """Mean SQNR of calibration tokens by modality."""
    tokens_of = [modality for modality in Modality if modality is not Modality.PADDING]
    sums = torch.zeros(len(tokens_of), 2, dtype=torch.float64)
    for target, output, batch in zip(targets.hidden, outputs.hidden, outputs.replay, strict=True):
        tokens = token_sqnr(target, output)
        for row, modality in zip(sums, tokens_of, strict=True):
            rows = tokens[batch.modality == modality]
            row += torch.tensor([float(rows.sum()), rows.numel()], dtype=torch.float64)
    pairs = zip(tokens_of, parallel.summed(sums).tolist(), strict=True)
    return {modality.name.lower(): total / count for modality, (total, count) in pairs if count}
