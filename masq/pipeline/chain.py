"""The chain of activations from block to block: outputs, their distance from the float chain, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from masq.calibration.replay import advance
from masq.errors import memory_errors_of
from masq.models.base import Modality
from masq.numerics.sqnr import token_sqnr
from masq.pipeline.fitting import Chain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.calibration.replay import ReplayBatch
    from masq.models.base import BlockAdapter
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
    first: dict[frozenset[int], int] = {}
    for index, batch in enumerate(replay):
        first.setdefault(frozenset(batch.modality.unique().tolist()) - {int(Modality.PADDING)}, index)
    return sorted(first.values())


def sqnr_text(sqnr: dict[str, float]) -> str:
    """For a progress line."""
    return "SQNR dB " + " ".join(f"{key} {value:.1f}" for key, value in sqnr.items())


def named(sqnr: dict[str, float]) -> dict[str, float]:
    """For whoever listens to the progress."""
    return {f"sqnr_{key}": value for key, value in sqnr.items()}


def mean_sqnr(targets: Chain, outputs: Chain) -> dict[str, float]:
    """Mean SQNR of calibration tokens by modality."""
    sums: dict[str, tuple[float, int]] = {}
    for target, output, batch in zip(targets.hidden, outputs.hidden, outputs.replay, strict=True):
        tokens = token_sqnr(target, output)
        for modality in Modality:
            rows = tokens[batch.modality == modality]
            if modality is not Modality.PADDING and rows.numel():
                total, count = sums.get(modality.name.lower(), (0.0, 0))
                sums[modality.name.lower()] = (total + float(rows.sum()), count + rows.numel())
    return {key: total / count for key, (total, count) in sums.items()}
