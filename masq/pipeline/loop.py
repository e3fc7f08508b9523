"""Two walks over the decoder: learn smoothing factors, then quantize. No method is named here.

Two chains run side by side: the float chain gives the target of every block, the quantized chain (outputs of the
blocks handled so far) gives its input, so that a block sees the errors of those before it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from masq.calibration.cache import Request, StatisticsCache
from masq.calibration.replay import BlockData, ReplayBatch, advance, capture
from masq.calibration.sensitivity import gradient_sums, mean_gradients, relative_sensitivity
from masq.errors import DataError, numerical_errors_of
from masq.models.base import Modality
from masq.numerics.sqnr import token_sqnr
from masq.pipeline.assembly import Stages
from masq.pipeline.fitting import Chain, Prepared, collect_on_float, looked_at, quantize_one, token_sample
from masq.pipeline.progress import BlockClock
from masq.pipeline.store import BlockStore, block_tensors, restore_block
from masq.transforms.config import LearnedSmoothing
from masq.transforms.fake_quantized import Factors, run_fake_quantized
from masq.transforms.learned import learn_factors
from masq.transforms.rotation import rotate_model
from masq.transforms.stages import SMOOTHING, SmoothingPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from masq.calibration.statistics import GroupStatistics
    from masq.models.base import BlockAdapter, EncodedBatch, ModelAdapter
    from masq.modules.modality import ModalityContext

_LOG = logging.getLogger(__name__)


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


def quantize(
    adapter: ModelAdapter,
    batches: Sequence[EncodedBatch],
    stages: Stages,
    context: ModalityContext,
    *,
    blocks: BlockStore,
    factors: BlockStore,
    gradients: BlockStore | None = None,
    cache: StatisticsCache | None = None,
) -> QuantizationReport:
    """Quantize every decoder block of ``adapter`` in place, after rotating the model where the method says so.

    Args:
        adapter: the float model.
        batches: encoded calibration samples.
        stages: the method.
        context: token modalities, installed on the model.
        blocks: where finished blocks are kept; present ones are restored instead of computed.
        factors: where learned factors are kept; shared by all methods with the same learning problem.
        gradients: where gradients that a stage asks for are kept, batch by batch; None to keep none.
        cache: where statistics of the float chain are kept; None to keep none.

    Returns:
        The report of the walk.

    Raises:
        NumericalError: NaN or divergence, naming block and linear; finished blocks stay in the stores.
        DataError: a stored block is damaged.
    """
    report = QuantizationReport()
    if stages.smoothing.kind != "none" or stages.compensation.kind != "none":
        _warn_about_missing(adapter, batches, report)
    sensitivity = _sensitivity(adapter, batches, stages, gradients, report)
    if stages.rotation.kind == "hadamard":
        started = time.perf_counter()
        rotate_model(adapter, stages.rotation, stages.seed)
        report.seconds["rotate"] = time.perf_counter() - started
    hidden, replay = capture(adapter, batches)
    learned: list[SmoothingPlan] | None = None
    if stages.learns:
        started = time.perf_counter()
        learned = _learn(adapter, hidden, replay, stages, context, factors, cache, report)
        report.seconds["learn"] = time.perf_counter() - started
    started = time.perf_counter()
    prepared = Prepared(learned, token_sample(replay, stages, len(adapter.blocks())), sensitivity, cache)
    _quantize(adapter, hidden, replay, stages, context, blocks, prepared, report)
    report.seconds["quantize"] = time.perf_counter() - started
    context.clear()
    return report


def restore(adapter: ModelAdapter, stages: Stages, context: ModalityContext, blocks: BlockStore) -> None:
    """Make of a float model the quantized one whose finished blocks are stored, without calibration.

    Args:
        adapter: the float model, changed in place.
        stages: the method and seed that the blocks were made with.
        context: token modalities, installed on the model.
        blocks: where ``quantize`` kept them.

    Raises:
        DataError: a block is missing or damaged.
    """
    if stages.rotation.kind == "hadamard":
        rotate_model(adapter, stages.rotation, stages.seed)
    adapter_blocks = adapter.blocks()
    dtype = adapter.embeddings().weight.dtype
    for index, block in enumerate(adapter_blocks):
        stored = blocks.load(index)
        if stored is None:
            raise DataError(
                "every block of a quantized model must be finished",
                value=f"block {index} of {len(adapter_blocks)} is missing",
                remedy="let the run finish: masq run with the same configuration goes on where it stopped",
            )
        own = stages.for_block(index, len(adapter_blocks))
        restore_block(block, stored[0], own.scheme, context, dtype)


def _warn_about_missing(adapter: ModelAdapter, batches: Sequence[EncodedBatch], report: QuantizationReport) -> None:
    seen = {int(m) for batch in batches for m in batch.modality.unique()}
    for modality in adapter.modalities:
        if int(modality) not in seen:
            report.warnings.append(
                f"no calibration token of modality {modality.name.lower()}: it uses the factors of text, uncorrected"
            )


def _sensitivity(
    adapter: ModelAdapter,
    batches: Sequence[EncodedBatch],
    stages: Stages,
    store: BlockStore | None,
    report: QuantizationReport,
) -> list[dict[Modality, float]] | None:
    """How much an error of each modality counts in every block of the float model, None where no stage asks."""
    floor = stages.sensitivity_floor
    if floor is None:
        return None
    started = time.perf_counter()
    clock = BlockClock("gradients of batch", len(batches))
    sums = []
    for index, batch in enumerate(batches):
        stored = store.load(index) if store else None
        if stored is None:
            magnitudes, counts = gradient_sums(adapter, batch)
            if store:
                store.save(index, {"sums": magnitudes, "counts": counts}, {})
        else:
            magnitudes, counts = stored[0]["sums"], stored[0]["counts"]
        sums.append((magnitudes, counts))
        clock.tick(f"{int(counts.sum())} tokens")
    report.seconds["gradients"] = time.perf_counter() - started
    return relative_sensitivity(mean_gradients(sums), floor)


def _outputs(block: BlockAdapter, name: str, inputs: Chain, context: ModalityContext) -> Chain:
    outputs = []
    for hidden_btd, batch in zip(inputs.hidden, inputs.replay, strict=True):
        context.set(batch.modality)
        outputs.append(advance(block, hidden_btd, batch, name))
    return Chain(outputs, inputs.replay)


def _learn(
    adapter: ModelAdapter,
    hidden: list[torch.Tensor],
    replay: list[ReplayBatch],
    stages: Stages,
    context: ModalityContext,
    store: BlockStore,
    cache: StatisticsCache | None,
    report: QuantizationReport,
) -> list[SmoothingPlan]:
    """First walk: factors of every block, on the chain in which each modality has its own weight Q(W s_m).

    Where the stages look at the float chain, every block starts from the float input again.
    """
    adapter_blocks = adapter.blocks()
    walk_needed = not store.has_all(len(adapter_blocks))
    clock = BlockClock("learn smoothing", len(adapter_blocks))
    floats = quantized = Chain(hidden, replay)
    plans, shown = [], _one_of_each_mix(replay)
    for index, block in enumerate(adapter_blocks):
        name, own = f"block {index}", stages.for_block(index, len(adapter_blocks))
        targets = _outputs(block, name, floats, context) if walk_needed else floats
        stored, outputs = store.load(index), None
        if stored is None:
            with numerical_errors_of(name):
                statistics = _start(block, index, quantized, own, cache)
                data = BlockData(quantized.hidden, targets.hidden, replay)
                factors, note, outputs = _learn_one(block, name, statistics, data, own)
            stored = _flatten(factors), note
            store.save(index, *stored)
        logs = _unflatten(stored[0], hidden[0].device)
        plans.append(SmoothingPlan({group: {m: log.exp() for m, log in by.items()} for group, by in logs.items()}))
        report.blocks.append({"index": index, **stored[1]})
        if stored[1].get("reverted"):
            report.warnings.append(f"{name}: learning did not lower the loss, the starting factors were kept")
        if walk_needed:
            found = Chain(
                outputs or run_fake_quantized(block, name, logs, quantized.hidden, replay, own.scheme), replay
            )
            losses = {key: stored[1][key] for key in ("initial_loss", "final_loss") if key in stored[1]}
            sqnr = _mean_sqnr(targets.pick(shown), found.pick(shown))
            text = " -> ".join(f"{loss:.4f}" for loss in losses.values())
            clock.tick(f"{f'loss {text}' if text else 'nothing to learn'} | {_sqnr_text(sqnr)}", losses | _named(sqnr))
            floats, quantized = targets, targets if stages.smoothing_on_float else found
    return plans


def _start(
    block: BlockAdapter, index: int, inputs: Chain, stages: Stages, cache: StatisticsCache | None
) -> dict[str, GroupStatistics]:
    """Ranges from which the closed form makes the factors that learning starts from."""
    request = Request(() if stages.smoothing.kind == "none" else stages.smoothing.groups)
    if stages.smoothing_on_float:
        return collect_on_float(cache, index, request, block, inputs)
    return request.collect(block, inputs.hidden, inputs.replay)


def _learn_one(
    block: BlockAdapter, name: str, statistics: dict[str, GroupStatistics], data: BlockData, stages: Stages
) -> tuple[Factors, dict[str, Any], list[torch.Tensor] | None]:
    """Learn the factors of one block, from those of the closed form on.

    Returns:
        Their logarithms, the losses, and the outputs of the block with them. Nothing of it where no linear in a
        smoothed group is quantized.
    """
    config = stages.smoothing
    if not isinstance(config, LearnedSmoothing):
        return {}, {}, None
    initial = SMOOTHING.get(config.kind)(block, statistics, config, stages.scheme).factors
    found = learn_factors(block, name, initial, data, stages.scheme, config, seed=stages.seed)
    note = {"initial_loss": found.initial_loss, "final_loss": found.final_loss, "reverted": found.reverted}
    return found.log_factors, note, found.outputs


def _quantize(
    adapter: ModelAdapter,
    hidden: list[torch.Tensor],
    replay: list[ReplayBatch],
    stages: Stages,
    context: ModalityContext,
    store: BlockStore,
    prepared: Prepared,
    report: QuantizationReport,
) -> None:
    """Second walk: statistics on the quantized chain, plan, round, correct, replace, advance.

    A chain that no stage learns from is only the yardstick of the progress lines: one batch of every mix of modalities
    is enough.
    """
    adapter_blocks = adapter.blocks()
    clock = BlockClock("quantize", len(adapter_blocks))
    shown, everything = _one_of_each_mix(replay), list(range(len(replay)))
    kept = [everything if all_of_it else shown for all_of_it in looked_at(stages, prepared, len(adapter_blocks))]
    floats, quantized = (Chain(hidden, replay).pick(indices) for indices in kept)
    in_floats, in_quantized = ([indices.index(one) for one in shown] for indices in kept)
    for index, block in enumerate(adapter_blocks):
        name, own = f"block {index}", stages.for_block(index, len(adapter_blocks))
        targets = _outputs(block, name, floats, context)
        stored = store.load(index)
        if stored is None:
            with numerical_errors_of(name):
                note = quantize_one(block, index, floats, quantized, own, context, prepared)
        else:
            restore_block(block, stored[0], own.scheme, context, hidden[0].dtype)
            note = stored[1]
        quantized = _outputs(block, name, quantized, context)
        sqnr = _mean_sqnr(targets.pick(in_floats), quantized.pick(in_quantized))
        if stored is None:
            store.save(index, block_tensors(block), note)
        floats = targets
        _merge(report.blocks, index, {"sqnr": sqnr, **note})
        for role, reason in note.get("rounding_fallbacks", {}).items():
            report.warnings.append(f"{name}.{role}: {reason}")
        clock.tick(_sqnr_text(sqnr), _named(sqnr))


def _one_of_each_mix(replay: Sequence[ReplayBatch]) -> list[int]:
    """Index of the first batch of every set of modalities."""
    first: dict[frozenset[int], int] = {}
    for index, batch in enumerate(replay):
        first.setdefault(frozenset(batch.modality.unique().tolist()) - {int(Modality.PADDING)}, index)
    return sorted(first.values())


def _sqnr_text(sqnr: dict[str, float]) -> str:
    return "SQNR dB " + " ".join(f"{key} {value:.1f}" for key, value in sqnr.items())


def _named(sqnr: dict[str, float]) -> dict[str, float]:
    return {f"sqnr_{key}": value for key, value in sqnr.items()}


def _mean_sqnr(targets: Chain, outputs: Chain) -> dict[str, float]:
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


def _merge(blocks: list[dict[str, Any]], index: int, values: dict[str, Any]) -> None:
    if index < len(blocks):
        blocks[index].update(values)
    else:
        blocks.append({"index": index, **values})


def _flatten(factors: Factors) -> dict[str, torch.Tensor]:
    return {f"{group}.{m.name.lower()}": factor for group, by in factors.items() for m, factor in by.items()}


def _unflatten(tensors: dict[str, torch.Tensor], device: torch.device) -> Factors:
    factors: Factors = {}
    for key in sorted(tensors):
        group, modality = key.split(".")
        factors.setdefault(group, {})[Modality[modality.upper()]] = tensors[key].to(device)
    return factors
